"""Paths: half-made images with a verifier beside them, which strategies extend, choose among and record."""

from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, DecodingState, Proposal, Request
from lightning_modules.decoding.strategy import Decoded, Judges, judge_named
from lightning_modules.decoding.trace import Choice
from lightning_modules.rewards.verifier import Nothing


class Paths:
    """n paths of each of B images, neighbours, which share the pass over their prompt; all are at the same step.

    Args:
        decoder: of the images.
        request: the images; the first path of each has the image's own noise.
        sampling: how candidates are drawn.
        k: candidates a step of each path, at most.
        n: paths of each image.
        judges: by name.
        verifier: name of the judge that values candidates; None values nothing.

    Attributes:
        state: of the decoder.
        verifier_state: what the verifier remembers.
        image: the image of each path, 0..B-1, [P], on the CPU.
        number: places of these P paths among the B * n that began, [P].
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
        self.decoder, self.rows, self.n, self.name = decoder, request.rows, n, verifier or ""
        self.verifier = None if verifier is None else judge_named(judges or {}, verifier)
        if self.verifier is not None:
            self.verifier.check_decoder(decoder)
        self.state: DecodingState = decoder.begin(request, sampling, k)
        self.verifier_state: Any = Nothing()
        if self.verifier is not None:
            self.verifier_state = self.verifier.begin(self.state.prompt, decoder.num_tokens)
        self.number = torch.arange(len(request.rows), device=self.state.tokens.device)
        self.image = torch.arange(len(request.rows))
        self.trace: list[Choice] = []
        self._decided: Tensor | None = None
        if n > 1:
            noise = decoder.noise(request.repeat(n).seeds, k, sampling)
            self.select(self.number.repeat_interleave(n))
            self.state = self.state.with_noise(noise)
            self.number = torch.arange(len(self), device=self.number.device)

    def __len__(self) -> int:
        return len(self.number)

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
        rows = [self.rows[i] for i in self.image.tolist()]
        previews = partial(self.decoder.preview, self.state, proposal)
        return self.verifier.value(self.verifier_state, rows, self.state, proposal, previews)

    def commit(self, proposal: Proposal, choice: Tensor | None = None) -> None:
        """Make candidate `choice` [P] part of each path; default: the first."""
        choice = torch.zeros_like(self.number) if choice is None else choice
        if self.verifier is not None:
            self.verifier.commit(self.verifier_state, choice)
        self._decided = self.state.decided
        self.decoder.commit(self.state, proposal, choice)

    def select(self, rows: Tensor) -> None:
        """Keep paths `rows` [P'], in that order and as often as they occur, each with its noise."""
        self.state, self.number, self.image = self.state.select(rows), self.number[rows], self.image[rows.cpu()]
        self.verifier_state = self.verifier_state.select(rows)

    def part(self, rows: Tensor) -> "Paths":
        """Copy paths `rows` [P'], which then continue on their own."""
        paths = copy(self)
        paths.select(rows)
        return paths

    def reassign(self, rows: Tensor) -> None:
        """Move paths `rows` [P] to the places of these; the noise of each place stays."""
        self.state = self.state.select(rows).with_noise(self.state.noise)
        self.verifier_state = self.verifier_state.select(rows)

    def fork(self, k: int) -> "Paths":
        """Make k paths of each, neighbours; path j draws with the noise of candidate j."""
        paths, rows = copy(self), torch.arange(len(self), device=self.number.device).repeat_interleave(k)
        paths.state, paths.number, paths.image = self.state.fork(k), self.number[rows], self.image[rows.cpu()]
        paths.verifier_state = self.verifier_state.select(rows)
        return paths

    def spread(self, values: Tensor, missing: float = 0) -> Tensor:
        """Put values [P, ...] at the places of their paths, [B, n, ...], where others have stopped: `missing`."""
        places = values.new_full((len(self.rows) * self.n, *values.shape[1:]), missing)
        return places.index_put((self.number,), values).unflatten(0, (-1, self.n))

    def record(self, tokens: Tensor, scores: Tensor, kept: Tensor, drawn: bool = False) -> None:
        """Record a choice among c candidates of each image, as `Choice` has it, after its commit."""
        decided = None
        if self._decided is not None and (tokens.shape[2] == 1 or not self.is_done):
            decided = self._decided.new_zeros(len(self.rows)).index_put((self.image,), self._decided + 1)
        self.trace.append(Choice(self.name, tokens, decided, scores, kept, drawn))

    def count(self, values: int) -> None:
        """Count values that were asked of the verifier."""
        self.state.cost.verifier_calls += values

    def finish(self, rows: Tensor | None = None, first_unverified: Tensor | None = None) -> Decoded:
        """Return the finished images, of paths `rows` [B] or of all.

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
