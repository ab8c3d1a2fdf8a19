"""The GenEval callback by itself."""

from typing import Any

from callbacks.geneval import GenEvalCallback


def make_callback(**settings: Any) -> GenEvalCallback:
    """A callback with as little as it can do with."""
    defaults: dict[str, Any] = {
        "reward": None, "strategies": {"sample": None}, "validation_strategies": ["sample"], "monitor": "sample",
        "before_training": False,
        "test_strategies": None,
        "validation_prompts": [], "test_prompts": [], "images_per_prompt": 1, "batch_size": 1, "every_n_epochs": 1,
        "seed": 0, "folder": "", "unfinished": "", "sheet_prompts": 0, "rewards": {}, "independent_judges": [],
    }  # fmt: skip
    return GenEvalCallback(**defaults | settings)
