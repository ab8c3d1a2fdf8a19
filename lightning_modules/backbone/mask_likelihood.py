"""Estimates of log p(image | prompt) by mask-token decoders, from random masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.backbone.sampling import uniform_noise


@dataclass(frozen=True)
class MaskEstimate:
    """How log p(image | prompt) is estimated.

    By default it is the bound of any-order decoders: with c of n tokens masked, c uniform in 1..n, the mean of
    n / c x log p(masked tokens | the others) (LLaDA, arXiv 2502.09992, equation 6). `as_trained` takes Show-o's own sum
    instead: c from its cosine schedule, no n / c, among all ids, and with soi and eoi.
    """

    n_masks: int = 4  # masks an image, each from its own n-th of the counts; more of them make less noise
    as_trained: bool = False

    def __post_init__(self) -> None:
        if self.n_masks < 1:
            raise ValueError(f"decoder.estimate.n_masks must be at least 1, not {self.n_masks}")

    def masks(self, seeds: Sequence[int], length: int) -> Tensor:
        """Choose the masked tokens of images with these seeds, bool [n_masks, B, length]."""
        noise = uniform_noise(seeds, self.n_masks, length)
        t = (torch.arange(self.n_masks) + noise[:, 0, : self.n_masks]) / self.n_masks  # [B, n_masks]
        if self.as_trained:
            count = (torch.cos(t * torch.pi / 2) * length).round().clamp(min=1)
        else:
            count = (t * length).floor() + 1
        order = noise[:, 1:].argsort(2).argsort(2)
        return (order < count[..., None]).transpose(0, 1)
