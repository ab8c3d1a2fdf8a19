"""Verified decoding with many paths: unpromising ones are dropped on the way, promising ones are continued twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.strategy import (
    Decoded,
    Judges,
    Strategy,
    begin_paths,
    decided_before,
    finished,
    verifier_named,
)
from lightning_modules.decoding.trace import Choice


@dataclass(frozen=True)
class Particles(Strategy):
    """n paths an image; every `stride` steps they are redrawn by how much each has gained in value.

    This is sequential Monte Carlo with the verifier as the twisting function: with `value_weight` 1, a perfect value
    and many paths it samples images from the decoder's distribution of those that fulfil the prompt. Where best-of-n
    finishes every candidate, here the compute of a hopeless prefix goes to a hopeful one. The path of the highest
    final value is the image; with a stride of the whole image this is best-of-n. Noted is the effective sample size: to
    how many paths of equal weight those before a redraw amount, of n, on average.

    Attributes:
        sampling: how paths are decoded.
        n: paths.
        stride: steps between redraws; 8 steps of a next-token decoder are a row of an 8x8 grid.
        verifier: its name.
        value_weight: paths are redrawn in proportion to (value / value at the last redraw) ** value_weight.
    """

    sampling: Sampling | MaskSampling
    n: int
    stride: int = 8
    verifier: str = "parm"
    value_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("n", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoding with particles needs {name} of at least 1, not {getattr(self, name)}")

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @property
    def images_at_once(self) -> int:
        return self.n

    @torch.no_grad()
    def decode(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Decoded:
        verifier = verifier_named(judges, self.verifier)
        state, watch = begin_paths(decoder, verifier, prompts, seeds, self.n, 1, self.sampling, tokens, keep)
        noise = state.noise
        first = torch.arange(len(prompts), device=state.tokens.device)
        paths = first.repeat_interleave(self.n)
        last = torch.zeros(len(prompts), self.n, device=state.tokens.device)
        sizes: list[Tensor] = []
        trace: list[Choice] = []
        while not state.done:
            verifier.follow(watch, state.evidence, state.position)
            proposal, chance = decoder.propose(state, 1), state.choice_noise[:: self.n]
            values = verifier.score(watch, proposal.evidence).view(-1, self.n)
            verifier.commit(watch, torch.zeros_like(paths))
            decoder.commit(state, proposal, torch.zeros_like(paths))
            if state.step % self.stride == 0 and not state.done:
                state.cost.verifier_calls += values.numel()
                # Systematic resampling: one uniform number places n evenly spaced points.
                gained = (values - last).masked_fill(state.finished.view_as(values), 0.0)
                sizes.append(effective_sample_size(self.value_weight * gained))
                kept = redraw(self.value_weight * gained, chance.to(values.device))
                paths_of = state.tokens.unflatten(0, values.shape)
                went_on = one_hot(kept, self.n).sum(1)
                decided = decided_before(state)
                decided = None if decided is None else decided[:: self.n]
                trace.append(Choice(self.verifier, paths_of, decided, values, went_on))
                rows = (first[:, None] * self.n + kept).flatten()
                last = values.gather(1, kept)
                state, watch = replace(state.select(rows), noise=noise), watch.select(rows)
        state.cost.verifier_calls += values.numel()
        winner = values.argmax(1)
        images = state.tokens.unflatten(0, values.shape)
        trace.append(Choice(self.verifier, images, None, values, one_hot(winner, self.n)))
        made = finished(state, torch.zeros(len(paths)))
        notes = {"effective_sample_size": torch.stack(sizes).mean(0)} if sizes else {}
        return replace(made.select(first * self.n + winner), trace=trace, notes=notes)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum of weights)^2 / sum of squared weights, from 1 to n, of weights [B, n] given as logarithms, [B]."""
    return 1 / log_weights.softmax(1).square().sum(1)


def redraw(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Systematic resampling: indices [B, n], in order, each drawn about n times its weight.

    Args:
        log_weights: [B, n], unnormalised.
        noise: uniform, [B].
    """
    cumulative = log_weights.softmax(1).cumsum(1)
    n = log_weights.shape[1]
    points = (torch.arange(n, device=noise.device) + noise[:, None]) / n
    return torch.searchsorted(cumulative, points.contiguous(), right=True).clamp(max=n - 1)
