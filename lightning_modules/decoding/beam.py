"""Beam search over a verifier's values: the best prefixes of an image go on, wherever they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy


@dataclass(frozen=True)
class Beam(Strategy):
    """At every step, each of n prefixes has k candidates; of all n * k the n that the verifier values most go on.

    No candidate is looked at beyond its own step, and all k of a prefix share its one decoder pass. Of equal ones one
    counts. The prefix of the highest final value is the image; with n = 1 this is verified decoding.

    Attributes:
        sampling: how candidates are drawn.
        n: prefixes.
        k: candidates of each.
        verifier: its name.
        prior_weight: score = log V + prior_weight log p, p being the sampling distribution's of the whole prefix.
    """

    sampling: Any
    n: int
    k: int
    verifier: str = "parm"
    prior_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise ValueError(f"beam search needs n and k of at least 1, not {self.n} and {self.k}")

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @property
    def images_at_once(self) -> int:
        return self.n * self.k

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, self.k, self.n, judges, self.verifier)
        batch, device = len(request.rows), paths.image.device
        first = torch.arange(batch, device=device) * self.n
        log_probs = torch.zeros(len(paths), 1, device=device)
        alive = (torch.arange(len(paths), device=device) % self.n == 0)[:, None]  # at first all are the same
        steps: list[_Step] = []
        while not paths.is_done:
            proposal = paths.propose(self.k)
            values, decided = paths.value(proposal), paths.state.decided
            paths.count(int(alive.sum()) * self.k)
            log_probs = log_probs + proposal.log_probs
            score = values + self.prior_weight * log_probs
            score = score.masked_fill(proposal.repeats | ~alive, -torch.inf)
            best, index = score.view(batch, -1).topk(self.n, dim=1)
            parent, choice = (first[:, None] + index // self.k).flatten(), (index % self.k).flatten()
            taken = index.new_zeros(batch, self.n * self.k).scatter(1, index, (best > -torch.inf).long())
            steps.append(_Step(proposal.tokens, values, taken, decided, index))
            alive = best.view(-1, 1) > -torch.inf
            log_probs = log_probs[parent, choice, None]
            paths.reassign(parent)
            paths.commit(proposal.select(parent), choice)
        self._record(paths, steps)
        return paths.finish(first)

    def _record(self, paths: Paths, steps: Sequence["_Step"]) -> None:
        """Record the choices among the candidates of those prefixes that the images began with."""
        prefix = torch.zeros_like(steps[-1].index[:, 0])
        rows = torch.arange(len(prefix), device=prefix.device)
        line = []
        for step in reversed(steps):
            prefix = step.index[rows, prefix] // self.k
            line.append(rows * self.n + prefix)
        for step, own in zip(steps, reversed(line), strict=True):
            decided = None if step.decided is None else step.decided[:: self.n] + 1
            paths.record(step.tokens[own], decided, step.values[own], step.taken.view(-1, self.k)[own])


@dataclass(frozen=True)
class _Step:
    """What n prefixes of B images had to choose from at a step.

    Attributes:
        tokens, values: of their k candidates, [B n, k, ...] and [B n, k].
        taken: how often each was, [B, n k].
        decided: tokens that were decided before, [B n]; None where they are not decided in order.
        index: the n candidates that were taken, of n k, [B, n].
    """

    tokens: Tensor
    values: Tensor
    taken: Tensor
    decided: Tensor | None
    index: Tensor
