"""Verified decoding with many paths: unpromising ones are dropped on the way, promising ones are continued twice."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy


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

    sampling: Any
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
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, 1, self.n, judges, self.verifier)
        shape = len(request.rows), self.n
        first = torch.arange(shape[0], device=paths.image.device) * self.n
        last = torch.zeros(shape, device=first.device)
        sizes: list[Tensor] = []
        while not paths.is_done:
            proposal, chance = paths.propose(), paths.state.choice_noise[:: self.n]
            values = paths.value(proposal).view(shape)
            paths.commit(proposal)
            if paths.state.step % self.stride == 0 and not paths.is_done:
                # Systematic resampling: one uniform number places n evenly spaced points.
                gained = (values - last).masked_fill(paths.state.is_complete.view(shape), 0.0)
                sizes.append(effective_sample_size(self.value_weight * gained))
                kept = redraw(self.value_weight * gained, chance.to(values.device))
                self._record(paths, values, one_hot(kept, self.n).sum(1))
                paths.reassign((first[:, None] + kept).flatten())
                last = values.gather(1, kept)
        # Of equally good ones one is drawn as in a redraw, or many perfect paths would not sample the posterior.
        gained = (self.value_weight * (values - last)).masked_fill(values < values.amax(1, keepdim=True), -torch.inf)
        weights = gained.softmax(1).cumsum(1)
        winner = (weights > chance.to(values.device)[:, None] * weights[:, -1:]).int().argmax(1)
        self._record(paths, values, one_hot(winner, self.n))
        stats = {"effective_sample_size": torch.stack(sizes).mean(0)} if sizes else {}
        return replace(paths.finish(first + winner), stats=stats)

    def _record(self, paths: Paths, values: Tensor, kept: Tensor) -> None:
        paths.count(values.numel())
        decided = None if paths.is_done or paths.state.decided is None else paths.state.decided[:: self.n]
        paths.record(paths.state.tokens.unflatten(0, values.shape), decided, values, kept)


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
