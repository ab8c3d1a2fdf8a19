"""Verified decoding: at every step the verifier sees k candidates and says which one goes on (PARM at test time)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling, image_seed
from lightning_modules.decoding.strategy import (
    Decoded,
    Judges,
    Strategy,
    check_readable,
    decided_before,
    finished,
    verifier_named,
)
from lightning_modules.decoding.trace import Choice
from lightning_modules.rewards.verifier import Verifier, VerifierState


@dataclass(frozen=True)
class Verified(Strategy):
    """Candidates of `stride` steps each, valued after the last one; a next-token decoder decides one token a step.

    With `stride` 1 and `choose: argmax` this is the method to the letter: k candidates at every step, the best goes
    on. One decoder pass a step serves all k. `choose: sample` with `value_weight` 1 draws a candidate in proportion to
    its value: with independent candidates and a perfect value that is sampling from the decoder's distribution of
    images that fulfil the prompt.

    Attributes:
        sampling: how candidates are drawn.
        k: candidates a step.
        stride: steps of a candidate; 8 verifies the rows of an 8x8 grid, token by token.
        verifier: its name.
        distinct: candidates (their first tokens) without repetition, instead of independent draws.
        choose: the best candidate, or a draw from softmax(score).
        value_weight, prior_weight: score = value_weight log V + prior_weight log p, p being the sampling distribution.
        random_stop: verify each image only up to a random step and go on plainly, to collect rollouts that show
            what becomes of the prefixes verified decoding visits (needs stride 1).
    """

    sampling: Sampling | MaskSampling
    k: int
    stride: int = 1
    verifier: str = "parm"
    distinct: bool = False
    choose: Literal["argmax", "sample"] = "argmax"
    value_weight: float = 1.0
    prior_weight: float = 0.0
    random_stop: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"verified decoding needs k of at least 1, not {self.k}")
        if self.stride < 1:
            raise ValueError(f"verified decoding needs a stride of at least 1, not {self.stride}")
        if self.random_stop and self.stride != 1:
            raise ValueError(f"random_stop needs stride 1, not {self.stride}")
        if self.choose not in ("argmax", "sample"):
            raise ValueError(f"choose must be 'argmax' or 'sample', not {self.choose!r}")

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @property
    def images_at_once(self) -> int:
        return self.k

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
        check_readable(decoder)
        noise = decoder.noise(seeds, self.k, self.sampling)
        state = decoder.begin([row["prompt"] for row in prompts], noise, self.sampling, tokens, keep)
        watch = verifier.begin(state.prompt, decoder.num_tokens)
        stop = torch.full((len(prompts),), state.steps)
        if self.random_stop:
            stop = torch.tensor([image_seed(seed, 0) % state.steps for seed in seeds])
        trace: list[Choice] = []
        while not state.done:
            if self.stride == 1:
                trace.append(self._step(decoder, verifier, state, watch, stop > state.step))
            else:
                state, watch, choice = self._block(decoder, verifier, state, watch)
                trace.append(choice)
        return finished(state, stop, trace)

    def _choose(self, values: Tensor, log_probs: Tensor, noise: Tensor) -> Tensor:
        """Index [B] of the candidate that goes on, from log-values and prior log-probabilities [B, k]."""
        score = self.value_weight * values + self.prior_weight * log_probs
        if self.choose == "argmax":
            return score.argmax(1)
        cumulative = score.softmax(1).cumsum(1)
        return (cumulative < noise[:, None] * cumulative[:, -1:]).sum(1).clamp(max=self.k - 1)

    def _step(
        self,
        decoder: Decoder,
        verifier: Verifier[Any],
        state: Any,
        watch: VerifierState,
        verify: Tensor,
    ) -> Choice:
        """One step: k candidates from the pass that was made anyway.

        Rows in which `verify` [B] is false take their first candidate.
        """
        verifier.follow(watch, state.evidence, state.position)
        proposal = decoder.propose(state, self.k, self.distinct)
        values = verifier.score(watch, proposal.evidence)
        choice = self._choose(values, proposal.sampling_log_probs, state.choice_noise)
        choice = choice * verify.to(choice.device)
        before = decided_before(state)
        verifier.commit(watch, choice)
        decoder.commit(state, proposal, choice)
        state.cost.verifier_calls += values.numel()
        candidates, decided = (proposal.tokens, None) if before is None else (proposal.tokens[..., None], before + 1)
        return Choice(self.verifier, candidates, decided, values, one_hot(choice, self.k))

    def _block(
        self, decoder: Decoder, verifier: Verifier[Any], state: Any, watch: VerifierState
    ) -> tuple[Any, VerifierState, Choice]:
        """`stride` steps: k paths run side by side, one of them goes on."""
        batch = len(state.tokens)
        proposal = decoder.propose(state, self.k, self.distinct).unfold()
        paths = state.fork(self.k)
        rows = torch.arange(batch, device=state.tokens.device)
        path_watch = watch.select(rows.repeat_interleave(self.k))
        only = torch.zeros(batch * self.k, dtype=torch.int64, device=rows.device)
        log_probs = torch.zeros_like(proposal.sampling_log_probs[:, 0])
        for step in range(self.stride):
            if paths.done:
                break
            if step:
                proposal = decoder.propose(paths, 1)
            verifier.follow(path_watch, paths.evidence, paths.position)
            log_probs = log_probs + proposal.sampling_log_probs[:, 0]
            values = verifier.score(path_watch, proposal.evidence)
            verifier.commit(path_watch, only)
            before = decided_before(paths)
            decoder.commit(paths, proposal, only)
        state.cost.verifier_calls += values.numel()
        values = values.view(batch, self.k)
        choice = self._choose(values, log_probs.view(batch, self.k), state.choice_noise)
        candidates = paths.tokens.unflatten(0, values.shape)
        decided = None if before is None else before[:: self.k] + 1
        seen = Choice(self.verifier, candidates, decided, values, one_hot(choice, self.k))
        kept = rows * self.k + choice
        state = replace(paths.select(kept), noise=state.noise)
        return state, path_watch.select(kept), seen
