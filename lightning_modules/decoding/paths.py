"""Paths: half-decoded images with a verifier beside them, which strategies extend, choose among and record."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, DecodingState, Proposal, Request
from lightning_modules.decoding.strategy import Decoded, Judges, verifier_named
from lightning_modules.decoding.trace import Choice


class Paths:
    """n paths of each of B images, neighbours, which share the pass over their prompt; all are at the same step.

    Args:
        decoder: of the images.
        request: the images; the first path of each has the image's own noise.
        sampling: how candidates are drawn.
        k: candidates a step of each path, at most.
        n: paths of each image.
        judges, verifier: by name, and the name of the one that values candidates; without a name none does.

    Attributes:
        state: of the decoder.
        image: which of the B images each path is of, [P].
        trace: the choices so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: Request,
        sampling: Any,
        k: int = 1,
        n: int = 1,
        judges: Judges | None = None,
        verifier: str | None = None,
    ) -> None:
        self.decoder, self.rows, self.judge = decoder, request.rows, verifier or ""
        self.verifier = None if verifier is None else verifier_named(judges or {}, verifier, decoder)
        self.state: DecodingState = decoder.begin(request, sampling, k)
        self.memory: Any = None if self.verifier is None else self.verifier.begin(self.state.prompt, decoder.num_tokens)
        self.image = torch.arange(len(request.rows), device=self.state.tokens.device)
        self.trace: list[Choice] = []
        if n > 1:
            noise = decoder.noise(request.repeat(n).seeds, k, sampling)
            self.select(self.image.repeat_interleave(n))
            self.state = self.state.with_noise(noise)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def is_done(self) -> bool:
        """All steps are done."""
        return self.state.is_done

    def propose(self, k: int = 1, distinct: bool = False) -> Proposal:
        """Draw k candidates for the next step of each path, from one forward pass."""
        return self.decoder.propose(self.state, k, distinct)

    def value(self, proposal: Proposal) -> Tensor:
        """Log-values of the paths extended by each candidate, [P, k]."""
        assert self.verifier is not None
        rows: Sequence[Mapping[str, Any]] = [self.rows[i] for i in self.image.tolist()]
        previews = partial(self.decoder.preview, self.state, proposal)
        return self.verifier.value(self.memory, rows, self.state, proposal, previews)

    def commit(self, proposal: Proposal, choice: Tensor | None = None) -> None:
        """Candidate `choice` [P] becomes part of each path; default: the first."""
        choice = torch.zeros_like(self.image) if choice is None else choice
        if self.verifier is not None:
            self.verifier.commit(self.memory, choice)
        self.decoder.commit(self.state, proposal, choice)

    def select(self, rows: Tensor) -> None:
        """Keep paths `rows` [P'], in that order and as often as they occur, each with its noise."""
        self.state, self.image = self.state.select(rows), self.image[rows]
        self.memory = self.memory if self.verifier is None else self.memory.select(rows)

    def reassign(self, rows: Tensor) -> None:
        """Paths `rows` [P] take the places of these; the noise of each place stays."""
        noise = self.state.noise
        self.select(rows)
        self.state = self.state.with_noise(noise)

    def fork(self, k: int) -> "Paths":
        """k paths of each, neighbours; path j draws with the noise of candidate j."""
        paths, rows = copy(self), torch.arange(len(self), device=self.image.device).repeat_interleave(k)
        paths.state, paths.image = self.state.fork(k), self.image[rows]
        paths.memory = self.memory if self.verifier is None else self.memory.select(rows)
        return paths

    def record(self, tokens: Tensor, decided: Tensor | None, scores: Tensor, kept: Tensor) -> None:
        """Note a choice among c candidates of each image, as `Choice` has it."""
        self.trace.append(Choice(self.judge, tokens, decided, scores, kept))

    def count(self, values: int) -> None:
        """Note how many values were asked of the verifier."""
        self.state.cost.verifier_calls += values

    def finish(self, rows: Tensor | None = None, first_unverified: Tensor | None = None) -> Decoded:
        """The finished images, of paths `rows` [B] or of all.

        Args:
            rows: which paths.
            first_unverified: see `Decoded.first_unverified`; default: 0.
        """
        state = self.state
        first_unverified = torch.zeros(len(self)) if first_unverified is None else first_unverified
        made = Decoded(
            state.tokens, state.features, state.cost, first_unverified, state.trajectory, log_probs=state.log_probs
        )
        return replace(made if rows is None else made.select(rows), trace=self.trace)
