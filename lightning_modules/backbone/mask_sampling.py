"""Parallel decoding of masked tokens: how many stay masked after a step, which ones, and the noise behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_modules.backbone.sampling import invert, uniform_noise

_KNOWN = torch.finfo(torch.float32).max  # stands for the probability of a token that is known: more than any other's


@dataclass(frozen=True)
class MaskSampling:
    """How a grid of masked tokens is filled.

    Attributes:
        steps: forward passes, T.
        guidance: scale s of classifier-free guidance, logits = (1 + s) conditional - s unconditional.
        temperature: of the noise on confidences; codes themselves are drawn at temperature 1.
    """

    steps: int = 18
    guidance: float = 1.75
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps must be at least 1, not {self.steps}")
        if self.guidance < 0:
            raise ValueError(f"sampling.guidance must be at least 0, not {self.guidance}")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature must be at least 0, not {self.temperature}")

    def temperature_at(self, step: int) -> float:
        """Show-o's schedule: what is left of the temperature shrinks by (step + 1) / T at every step."""
        return self.temperature * math.prod(1 - (j + 1) / self.steps for j in range(step + 1))


def masked_after(step: int, steps: int, unknown: Tensor) -> Tensor:
    """How many tokens of each row stay masked after a step, int64 [B]: cosine schedule (MaskGIT, arXiv 2202.04200).

    Of the tokens that are unknown before the step one at least is fixed, and one at least stays masked. In single
    precision, as Show-o computes it: in double precision some counts are others.

    Args:
        step: 0-based.
        steps: T.
        unknown: bool [B, n].
    """
    ratio = torch.tensor((step + 1) / steps, dtype=torch.float32)
    count = torch.floor(unknown.shape[1] * torch.cos(ratio * math.pi * 0.5)).to(unknown.device)
    return torch.minimum(unknown.sum(1) - 1, count).clamp(min=1).long()


def least_confident(
    probs: Tensor, unknown: Tensor, count: Tensor, temperature: Tensor | float, noise: Tensor
) -> Tensor:
    """Which tokens are masked for the next step: the `count` [B] least confident ones, bool [B, n].

    TokenConfidence is log p + temperature x Gumbel noise; ties at the cut are kept.

    Args:
        probs: of the drawn codes, [B, n].
        unknown: tokens that were masked before the step, bool [B, n].
        count: [B].
        temperature: a number, or one for each row, [B, 1].
        noise: uniform noise [B, n].
    """
    log_p = torch.where(unknown, probs, _KNOWN).clamp(min=1e-20).log()
    gumbel = -(-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    confidence = log_p + temperature * gumbel
    cut = confidence.sort(1).values.gather(1, count[:, None])
    return confidence < cut


class MaskNoise(Protocol):
    """The randomness of B images, k candidates a step."""

    def codes(self, step: int, where: Tensor, probs: Tensor, k: int) -> Tensor:
        """Draw k codes [M, k] from probabilities [M, C] at positions `where` [M] of the B * n, counted row by row."""
        ...

    def confidence(self, step: int, k: int) -> Tensor:
        """Uniform noise [B, k, n] for the confidences."""
        ...

    def choice(self, step: int) -> Tensor:
        """Uniform noise [B] for choosing among the candidates."""
        ...

    def select(self, rows: Tensor) -> "MaskNoise":
        """The noise of rows `rows` [B'], in that order and as often as they occur."""
        ...

    def fork(self, k: int) -> "MaskNoise":
        """The noise of k paths a row; path j has that of candidate j."""
        ...

    def to(self, device: torch.device) -> "MaskNoise":
        """The same on another device."""
        ...


@dataclass(frozen=True)
class SeededNoise:
    """Noise that belongs to the image: the same whatever else is in the batch.

    Attributes:
        uniform: [B, 2K + 1, T, n] for K candidates: a row for codes and one for confidences each; the last one is for
            choosing.
    """

    uniform: Tensor

    @staticmethod
    def draw(seeds: Sequence[int], k: int, steps: int, tokens: int) -> "SeededNoise":
        """The noise of images with these seeds; more candidates leave the first ones' as it is."""
        return SeededNoise(uniform_noise(seeds, 2 * k, steps * tokens).unflatten(2, (steps, tokens)))

    def codes(self, step: int, where: Tensor, probs: Tensor, k: int) -> Tensor:
        noise = self.uniform[:, : 2 * k : 2, step].transpose(1, 2).flatten(0, 1)
        return invert(probs, noise[where])

    def confidence(self, step: int, k: int) -> Tensor:
        return self.uniform[:, 1 : 2 * k : 2, step]

    def choice(self, step: int) -> Tensor:
        return self.uniform[:, -1, step, 0]

    def fork(self, k: int) -> "SeededNoise":
        own = self.uniform[:, : 2 * k].unflatten(1, (k, 2)).flatten(0, 1)
        choosing = self.uniform[:, -1:].repeat_interleave(k, 0)
        return SeededNoise(torch.cat([own, choosing], 1))

    def to(self, device: torch.device) -> "SeededNoise":
        return SeededNoise(self.uniform.to(device))

    def select(self, rows: Tensor) -> "SeededNoise":
        return SeededNoise(self.uniform[rows.to(self.uniform.device)])
