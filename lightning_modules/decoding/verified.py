"""Verified decoding: at every step the verifier values k candidates and one continues (PARM at test time)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import image_seed, invert
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, StridedStrategy, require_positive


@dataclass(frozen=True)
class Verified(StridedStrategy):
    """Candidates of `stride` steps each, valued after the last one; a next-token decoder decides one token a step.

    With `stride` 1 and `choose: argmax` this is step-wise verification by PARM (arXiv 2501.13926, section 3) to the
    letter: k candidates at every step, from one decoder pass, the best continues. `choose: sample` with `value_weight`
    1 draws a candidate in proportion to its value: with independent candidates and a perfect value that is sampling
    from the decoder's distribution of images that fulfil the prompt.

    Attributes:
        k, stride: candidates, and steps of each; 8 steps are a row of an 8x8 grid, token by token.
        distinct: candidates (their first tokens) without repetition, instead of independent draws.
        choose: the best candidate, or a draw from softmax(score).
        value_weight, prior_weight: score = value_weight log V + prior_weight log p, p being the sampling distribution.
        random_stop: verify each image up to a random step and decode the rest plainly, for rollouts that show what
            becomes of the prefixes verified decoding visits (needs stride 1).
    """

    k: int
    stride: int = 1
    verifier: str = "parm"
    distinct: bool = False
    choose: Literal["argmax", "sample"] = "argmax"
    value_weight: float = 1.0
    prior_weight: float = 0.0
    random_stop: bool = False

    def __post_init__(self) -> None:
        require_positive("verified decoding", k=self.k, stride=self.stride)
        if self.random_stop and self.stride != 1:
            raise ValueError(f"random_stop needs stride 1, not {self.stride}")
        if self.choose not in ("argmax", "sample"):
            raise ValueError(f"choose must be 'argmax' or 'sample', not {self.choose!r}")

    def check_decoder(self, decoder: Decoder) -> None:
        super().check_decoder(decoder)
        decoder.check_candidates(self.k, self.sampling)

    @property
    def images_at_once(self) -> int:
        return self.k

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, self.k, judges=judges, verifier=self.verifier)
        steps = paths.state.steps
        stop = torch.tensor([image_seed(seed, 0) % steps if self.random_stop else steps for seed in request.seeds])
        while not paths.is_done:
            if self.stride == 1:
                self._step(paths, stop)
            else:
                self._block(paths)
        return replace(paths.finish(), first_unverified=stop)

    def _choose(self, values: Tensor, log_probs: Tensor, noise: Tensor) -> Tensor:
        """Index [B] of the candidate that is taken, from log-values and prior log-probabilities [B, k]."""
        score = self.value_weight * values + self.prior_weight * log_probs
        return score.argmax(1) if self.choose == "argmax" else invert(score.softmax(1), noise[:, None]).squeeze(1)

    def _step(self, paths: Paths, stop: Tensor) -> None:
        """Make one step: k candidates from the pass that is made anyway; from step `stop` [B] on the first is taken."""
        proposal = paths.propose(self.k, self.distinct)
        values = paths.value(proposal)
        choice = self._choose(values, proposal.log_probs, paths.state.choice_noise)
        if self.random_stop:
            choice = choice * (stop > paths.state.step).to(choice.device)
        paths.commit(proposal, choice)
        paths.count(values.numel())
        paths.record(proposal.tokens, values, one_hot(choice, self.k), self.choose == "sample")

    def _block(self, paths: Paths) -> None:
        """Make `stride` steps: k lanes of each path run side by side, one of them is taken."""
        shape = len(paths), self.k
        lanes, proposal = paths.fork(self.k), paths.propose(self.k, self.distinct).unfold()
        log_probs = torch.zeros_like(proposal.log_probs[:, 0])
        for _ in range(min(self.stride, lanes.state.steps - lanes.state.step) - 1):
            log_probs = log_probs + proposal.log_probs[:, 0]
            lanes.skip(proposal)
            lanes.commit(proposal)
            proposal = lanes.propose()
        log_probs, values = log_probs + proposal.log_probs[:, 0], lanes.value(proposal).view(shape)
        lanes.commit(proposal)
        choice = self._choose(values, log_probs.view(shape), paths.state.choice_noise)
        lanes.record_paths(values, one_hot(choice, self.k), self.choose == "sample")
        paths.reassign(paths.number * self.k + choice, lanes)
