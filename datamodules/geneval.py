"""GenEval prompts: the embedded shapes prompts or a file in the official format."""

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.shapes.prompts import Split, shapes_prompts
from lightning_modules.rewards.geneval import read_prompts

Metadata = dict[str, Any]


def prompts_from_shapes(split: Split, per_task: int | Mapping[str, int]) -> list[Metadata]:
    """`per_task` prompts of each task, or of those that it names, from a split of the shapes world."""
    return shapes_prompts(split, per_task)


def prompts_from_file(path: str, class_names: Sequence[str]) -> list[Metadata]:
    """The prompts of a JSONL file in GenEval's format.

    Raises:
        FileNotFoundError, ValueError: no such file, or a broken row; the sentence names file and line.
    """
    return read_prompts(path, tuple(class_names))
