"""Drawing tokens from logits with noise that belongs to the image, not to the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor


def refuse_below(least: int, **settings: float) -> None:
    """Raise ValueError for a setting of sampling that is too small, by its name in the config."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"sampling.{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0  # divides the logits; > 0
    top_k: int = 0  # keep only the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this (nucleus); 1 keeps all
    guidance: float = 0.0  # scale s of classifier-free guidance, logits = (1 + s) conditional - s unconditional
    guided_tokens: int | None = None  # guide only so many tokens, the first ones; null guides all

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"sampling.temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must lie in (0, 1], not {self.top_p}")
        refuse_below(0, top_k=self.top_k, guidance=self.guidance, guided_tokens=self.guided_tokens or 0)

    def guidance_at(self, positions: Tensor) -> float | Tensor:
        """The scale of guidance at positions of the image [...]: one for all, or [..., 1]."""
        if self.guided_tokens is None:
            return self.guidance
        return (positions < self.guided_tokens)[..., None] * self.guidance


def image_seed(*parts: int) -> int:
    """One seed from (run seed, prompt index, sample index, ...): equal parts give equal seeds, on any machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniform_noise(seeds: Sequence[int], candidates: int, steps: int) -> Tensor:
    """Uniform noise in [0, 1), [B, 1 + candidates, steps], row b from seeds[b] alone; more candidates only add."""
    generator, shape = torch.Generator(), (1 + candidates, steps)
    rows = [torch.rand(shape, generator=generator.manual_seed(seed), dtype=torch.float32) for seed in seeds]
    return torch.stack(rows)


@dataclass(frozen=True)
class Noise:
    """Uniform noise of B images: each row comes from the seed of its image alone."""

    candidates: Tensor  # for drawing each of K candidates, [B, K, ...]; a later index is the step
    choice: Tensor  # for choosing among them at each step, [B, steps]

    def __getitem__(self, rows: Tensor) -> Self:
        return replace(self, candidates=self.candidates[rows], choice=self.choice[rows])

    def fork(self, k: int) -> Self:
        """The noise of k paths a row, neighbours; path j has that of candidate j."""
        own = self.candidates[:, :k].flatten(0, 1)[:, None]
        return replace(self, candidates=own, choice=self.choice.repeat_interleave(k, 0))

    def to(self, device: torch.device) -> Self:
        return replace(self, candidates=self.candidates.to(device), choice=self.choice.to(device))


def guide(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance, (1 + s) conditional - s unconditional, of logits or of what they are linear in.

    The scale s is a number, or a tensor that is broadcast.
    """
    scale = guidance.to(conditional.dtype) if isinstance(guidance, Tensor) else guidance
    return torch.lerp(unconditional, conditional, 1 + scale)


def sampling_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [B, V] of the distribution that tokens are drawn from, -inf for those cut off.

    The logits [B, V] are guided already; the temperature, top-k and top-p follow in this order.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits.log_softmax(-1)


def draw(logits: Tensor, sampling: Sampling, noise: Tensor, distinct: bool) -> tuple[Tensor, Tensor]:
    """Draw k tokens from guided logits [B, V] at uniform noise [B, k]; return them and their log-probabilities, [B, k].

    The probabilities are those of the sampling distribution. `distinct` tokens are drawn without replacement; where
    fewer than k have any probability, the last one repeats.
    """
    log_p = sampling_log_probs(logits, sampling)
    probs = log_p.exp()
    tokens = invert(probs, noise[:, :1] if distinct else noise)
    for j in range(1, noise.shape[1] if distinct else 0):
        last = tokens[:, -1:]
        probs = probs.scatter(-1, last, 0.0)
        token = torch.where(probs.sum(-1, keepdim=True) > 0, invert(probs, noise[:, j : j + 1]), last)
        tokens = torch.cat([tokens, token], dim=-1)
    return tokens, log_p.gather(-1, tokens)


def invert(probs: Tensor, noise: Tensor) -> Tensor:
    """Index at which the cumulative sum of probs [B, V] (any scale) passes noise [B, k] times their sum."""
    cumulative = probs.cumsum(-1)
    # Rounding may carry the threshold to the very end, past tokens of no probability: step back to the last real one.
    target = (noise * cumulative[:, -1:]).minimum(cumulative[:, -1:] * (1 - 1e-6))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[-1] - 1)
