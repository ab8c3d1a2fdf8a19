"""A known picture that a detector has to understand before it judges anything.

Wrong weights, a wrong config or wrong kernels do not fail by themselves: they find nothing, and every score is low.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.files import BUNDLED
from lightning_modules.image_reader import read_image
from lightning_modules.jsonl import read_jsonl
from lightning_modules.rewards.geneval_metadata import validate_metadata
from lightning_modules.rewards.geneval_rules import Verdict

Judge = Callable[[Sequence[Mapping[str, Any]], Sequence[np.ndarray]], list[Verdict]]


class SelfTest:
    """A picture and what it shows.

    Args:
        folder: with `picture.png` and `prompts.jsonl`, or `bundled:NAME`. Each line is a prompt in GenEval's format
            and whether the picture fulfils it, `correct`; some must, some must not.

    Raises:
        FileNotFoundError: there is no such folder, picture or list.
        ValueError: a row is broken, or the list could be passed without finding anything.
    """

    reads = ("folder",)

    def __init__(self, folder: str) -> None:
        name = folder.removeprefix("bundled:")
        self.folder = BUNDLED / name if name != folder else Path(folder)
        picture, prompts = self.folder / "picture.png", self.folder / "prompts.jsonl"
        for path in (picture, prompts):
            if not path.is_file():
                raise FileNotFoundError(f"geneval.reward.self_test.folder: there is no {path}")
        self.picture = read_image(picture, str(picture)).pixels
        self.lines = list(read_jsonl(prompts))
        for place, row in self.lines:
            if not isinstance(row, dict) or not isinstance(row.get("correct"), bool):
                raise ValueError(f"{place}: not a prompt with the key 'correct', true or false")
        if len({row["correct"] for _, row in self.lines}) != 2:
            raise ValueError(f"{prompts}: needs prompts that the picture fulfils, and ones that it does not")
        self.done = False

    def check(self, judge: Judge, class_names: Sequence[str]) -> None:
        """Have the picture judged by a detector of these classes, once; raises ValueError if a verdict is wrong."""
        if self.done:
            return
        self.done = True  # judging the picture would start the test anew
        for place, row in self.lines:
            validate_metadata(row, class_names, place)
        rows = [row for _, row in self.lines]
        for row, verdict in zip(rows, judge(rows, [self.picture] * len(rows)), strict=True):
            if verdict.correct != row["correct"]:
                self.done = False
                answer = verdict.reason.replace("\n", "; ") or "all of it was found"
                raise ValueError(
                    f"the detector fails its self-test: {self.folder / 'picture.png'} should "
                    f"{'' if row['correct'] else 'not '}show {row['prompt']!r}, but {answer}; are these the right "
                    f"weights? (geneval.reward.self_test.folder=DIR tests on another picture, "
                    f"geneval.reward.self_test=null goes without)"
                )
