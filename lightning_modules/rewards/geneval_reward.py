"""GenEval's rules as a reward: detect the objects of an image, then apply the rules."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_modules.rewards.geneval import Detections, GenEvalRules, Verdict
from lightning_modules.rewards.verifier import Reward


class Detector(Protocol):
    """Finds objects in images."""

    class_names: tuple[str, ...]

    def __call__(self, images: np.ndarray) -> list[Detections]:
        """Images, uint8 [B, H, W, 3] -> detections of each."""
        ...


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3]; truncated, as Show-o's scripts do."""
    return (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class GenEvalReward(Reward):
    """1 for an image that is correct by GenEval's rules, else 0.

    Args:
        detector: finds the objects; its classes are the ones that prompts may name.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.rules = GenEvalRules(class_names=detector.class_names)

    def verdicts(self, prompts: Sequence[Mapping[str, Any]], images: np.ndarray) -> list[Verdict]:
        """GenEval metadata of B prompts and uint8 images [B, H, W, 3] -> what the rules say of each."""
        return self.judge(prompts, self.detector(images))

    def judge(self, prompts: Sequence[Mapping[str, Any]], found: Sequence[Detections]) -> list[Verdict]:
        """The same from what was detected in the images."""
        return [self.rules.evaluate(row, detections) for row, detections in zip(prompts, found, strict=True)]

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        verdicts = self.verdicts(prompts, to_uint8(pixels))
        return torch.tensor([float(verdict.correct) for verdict in verdicts], device=pixels.device)
