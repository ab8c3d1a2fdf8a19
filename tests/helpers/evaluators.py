"""Evaluators that need no config."""

from collections.abc import Mapping
from typing import Any

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.evaluator import Evaluator
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.registry import JudgeRegistry
from lightning_modules.rewards.verifier import Judge


def make_evaluator(
    geneval: GenEvalReward | None,
    rewards: Mapping[str, Judge],
    decoder: Decoder | None = None,
    parm: PARM | None = None,
    **settings: Any,
) -> Evaluator:
    """An evaluator with as little as it can do with."""
    defaults: dict[str, Any] = {
        "strategies": {}, "images_per_prompt": 1, "batch_size": 1, "seed": 0, "sheet_prompts": 4,
        "independent_judges": [], "fid": None, "unfinished": "",
    }  # fmt: skip
    return Evaluator(JudgeRegistry(geneval, rewards, decoder, parm), **defaults | settings)
