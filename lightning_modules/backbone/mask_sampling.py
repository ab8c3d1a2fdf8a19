"""Parallel decoding of masked tokens: how many stay masked after a step, which ones, and the noise behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.backbone.sampling import Noise, invert, refuse_below, uniform_noise

_LEAST_NOISE = 0.01  # nats: below, rounding would decide on which side of the cut a code is


@dataclass(frozen=True)
class MaskSampling:
    """How a grid of masked tokens is filled."""

    steps: int = 18  # forward passes, T
    guidance: float = 1.75  # scale s of classifier-free guidance, logits = (1 + s) conditional - s unconditional
    temperature: float = 1.0  # of the noise on confidences; codes themselves are drawn at temperature 1
    # The probability of a step is that of the codes it fixes, and with this also that the others are masked again. It
    # changes no image, only what policy gradients see.
    score_remasked: bool = False

    def __post_init__(self) -> None:
        refuse_below(1, steps=self.steps)
        refuse_below(0, guidance=self.guidance, temperature=self.temperature)

    def temperature_at(self, step: int) -> float:
        """Show-o's schedule: what is left of the temperature shrinks by (step + 1) / T at every step."""
        return self.temperature * math.prod(1 - (j + 1) / self.steps for j in range(step + 1))


def masked_after(step: int, steps: int, unknown: Tensor) -> Tensor:
    """Count the tokens of each row that stay masked after a step, int64 [B], by MaskGIT's cosine (arXiv 2202.04200).

    Of the tokens that are `unknown` [B, n] before the step (0-based) one at least is fixed, and one at least stays
    masked. Single precision, as in Show-o: in double precision some counts differ.
    """
    ratio = torch.tensor((step + 1) / steps, dtype=torch.float32)
    count = torch.floor(unknown.shape[1] * torch.cos(ratio * math.pi * 0.5)).to(unknown.device)
    return torch.minimum(unknown.sum(1) - 1, count).clamp(min=1).long()


def least_confident(
    probs: Tensor, unknown: Tensor, count: Tensor, temperature: Tensor | float, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the `count` [B] least confident tokens, to be masked for the next step, bool [B, n].

    Returned with the cut [B], the least confidence of the others.

    Confidence is log p of the drawn codes, whose `probs` are [B, n], + temperature (a number or [B, 1]) x Gumbel noise,
    made of uniform noise [B, n]. Tokens that tie at the cut are fixed; those that were not `unknown` [B, n] stay so.
    """
    log_p = torch.where(unknown, probs, torch.finfo(torch.float32).max).clamp(min=1e-20).log()  # known: surest of all
    gumbel = -(-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    confidence = log_p + temperature * gumbel
    cut = confidence.sort(1).values.gather(1, count[:, None])
    return confidence < cut, cut[:, 0]


def masked_again_log_probs(log_p: Tensor, cut: Tensor, temperature: float) -> Tensor:
    """Log-probability that M positions draw codes whose confidence is below a cut [M], so that they stay masked, [M].

    The first of Mask-GRPO's definitions (arXiv 2510.13418, section 3) counts it beside the codes that are fixed: the
    probability of all codes, of log-probabilities `log_p` [M, C], that are less probable than the least probable one
    that was fixed. That leaves the noise on confidences out. Here the noise is in: code c is below the cut with
    probability exp(-exp((log p(c) - cut) / temperature)), by Gumbel's distribution. Without noise it is theirs. The
    cut, and how each code fares against it, are taken as given: gradients are those of the probabilities of codes.
    """
    excess = ((log_p.detach() - cut[:, None]) / max(temperature, _LEAST_NOISE)).clamp(max=10)
    below = (log_p.exp() * (-excess.exp()).exp()).sum(-1)
    return below.clamp(min=1e-6).log()


@dataclass(frozen=True)
class SeededNoise(Noise):
    """Noise of grids of n tokens, filled in T steps: [B, K, 2, T, n], for codes of candidates and for confidences."""

    @staticmethod
    def draw(seeds: Sequence[int], k: int, steps: int, tokens: int) -> "SeededNoise":
        """The noise of images with these seeds; more candidates leave that of the first ones as it is."""
        uniform = uniform_noise(seeds, 2 * k, steps * tokens).unflatten(2, (steps, tokens))
        return SeededNoise(uniform[:, :-1].unflatten(1, (k, 2)), uniform[:, -1, :, 0])

    def codes(self, step: int, positions: Tensor, probs: Tensor, k: int) -> Tensor:
        """Draw k codes [M, k] from probabilities [M, C] at positions [M] of the B * n, counted row by row."""
        return invert(probs, self.candidates[:, :k, 0, step].transpose(1, 2).flatten(0, 1)[positions])

    def confidence(self, step: int, k: int) -> Tensor:
        """Uniform noise [B, k, n] for the confidences."""
        return self.candidates[:, :k, 1, step]
