"""Beam search over a verifier's values: the best prefixes of an image go on, wherever they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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

    sampling: Sampling | MaskSampling
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
        state, watch = begin_paths(decoder, verifier, prompts, seeds, self.n, self.k, self.sampling, tokens, keep)
        noise, device = state.noise, state.tokens.device
        image = torch.arange(len(prompts), device=device)
        log_probs = torch.zeros(len(state.tokens), 1, device=device)
        alive = (torch.arange(len(state.tokens), device=device) % self.n == 0)[:, None]  # at first all are the same
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]] = []
        while not state.done:
            verifier.follow(watch, state.evidence, state.position)
            proposal = decoder.propose(state, self.k)
            values = verifier.score(watch, proposal.evidence)
            state.cost.verifier_calls += int(alive.sum()) * self.k
            log_probs = log_probs + proposal.sampling_log_probs
            score = values + self.prior_weight * log_probs
            score = score.masked_fill(proposal.repeats | ~alive, -torch.inf)
            best, index = score.view(len(prompts), -1).topk(self.n, dim=1)
            parent = (image[:, None] * self.n + index // self.k).flatten()
            choice = (index % self.k).flatten()
            went_on = index.new_zeros(len(prompts), self.n * self.k).scatter(1, index, (best > -torch.inf).long())
            steps.append((proposal.tokens, values, went_on, decided_before(state), index))
            alive = best.view(-1, 1) > -torch.inf
            log_probs = log_probs[parent, choice, None]
            state, watch = replace(state.select(parent), noise=noise), watch.select(parent)
            verifier.commit(watch, choice)
            decoder.commit(state, proposal.select(parent), choice)
        made = finished(state, torch.zeros(len(state.tokens)))
        return replace(made.select(image * self.n), trace=self._line(steps))

    def _line(self, steps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]]) -> list[Choice]:
        """The choices among the candidates of those prefixes that the images began with.

        Args:
            steps: of n prefixes and k candidates each: tokens [B * n, k, ...] and values [B * n, k], how often each
                went on [B, n * k], tokens decided before them [B * n] (None if not in order), and the candidates that
                went on, [B, n], of n * k.
        """
        trace: list[Choice] = []
        prefix = torch.zeros_like(steps[-1][-1][:, 0])
        rows = torch.arange(len(prefix), device=prefix.device)
        for tokens, values, went_on, before, index in reversed(steps):
            prefix = index[rows, prefix] // self.k
            own = rows * self.n + prefix
            kept = went_on.view(-1, self.k)[own]
            if before is None:
                trace.append(Choice(self.verifier, tokens[own], None, values[own], kept))
            else:
                trace.append(Choice(self.verifier, tokens[own, :, None], before[:: self.n] + 1, values[own], kept))
        return trace[::-1]
