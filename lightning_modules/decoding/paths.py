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
        decoder, request: of the images; the first path of each has the image's own noise.
        sampling, k: how candidates are drawn, and how many a step of each path, at most.
        n: paths of each image.
        judges, verifier: the judge of this name values candidates; None values nothing.

    Attributes:
        state, verifier_state: of the decoder; what the verifier remembers.
        image, number: the image of each path, [P], on the CPU; its place among the B * n that began, ascending, [P].
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
        prompt = self.state.prompt
        self.verifier_state: Any = self.verifier.begin(prompt, decoder.num_tokens) if self.verifier else Nothing()
        self.image = torch.arange(len(request.rows)).repeat_interleave(n)
        self.number = torch.arange(len(self.image), device=self.state.tokens.device)
        self.trace: list[Choice] = []
        self._decided: Tensor | None = None
        if n > 1:
            self._move(self, self.number // n, decoder.noise(request.repeat(n).seeds, k, sampling))

    def __len__(self) -> int:
        return len(self.number)

    @property
    def is_done(self) -> bool:
        """All steps are done."""
        return self.state.is_done

    def is_due(self, stride: int) -> bool:
        """The next step completes `stride` steps, or the image."""
        step = self.state.step + 1
        return step % stride == 0 or step == self.state.steps

    def propose(self, k: int = 1, distinct: bool = False) -> Proposal:
        """Draw k candidates for the next step of each path, from one forward pass."""
        return self.decoder.propose(self.state, k, distinct)

    def value(self, proposal: Proposal) -> Tensor:
        """Log-values of the paths extended by each candidate, [P, k]."""
        assert self.verifier is not None
        rows = [self.rows[i] for i in self.image.tolist()]
        previews = partial(self.decoder.preview, self.state, proposal)
        return self.verifier.value(self.verifier_state, rows, self.state, proposal, previews)

    def skip(self, proposal: Proposal) -> None:
        """Let the verifier see a step whose value nobody asks for, if it has to."""
        if self.verifier is not None and self.verifier.remembers:
            self.value(proposal)

    def commit(self, proposal: Proposal, choice: Tensor | None = None) -> None:
        """Make candidate `choice` [P] part of each path; default: the first."""
        choice = torch.zeros_like(self.number) if choice is None else choice
        if self.verifier is not None:
            self.verifier.commit(self.verifier_state, choice)
        self._decided = self.state.decided
        self.decoder.commit(self.state, proposal, choice)

    def select(self, rows: Tensor) -> "Paths":
        """Copy paths `rows` [P'], ascending, each with its noise; the trace is shared."""
        paths = copy(self)
        paths.number, paths.image = self.number[rows], self.image[rows.cpu()]
        paths.state, paths.verifier_state = self.state.select(rows), self.verifier_state.select(rows)
        return paths

    def fork(self, k: int) -> "Paths":
        """Make k paths of each, neighbours, with a shared trace; path j draws with the noise of candidate j."""
        paths = copy(self)
        paths.n, paths.image = k * self.n, self.image.repeat_interleave(k)
        paths.number = torch.arange(len(paths.image), device=self.number.device)
        paths.state, paths.verifier_state = self.state.fork(k), self.verifier_state.select(paths.number // k)
        return paths

    def reassign(self, rows: Tensor, paths: "Paths | None" = None) -> None:
        """Move paths `rows` [P] of these, or of others, to the places of these; the noise of each place stays."""
        self._move(self if paths is None else paths, rows, self.state.noise)

    def _move(self, paths: "Paths", rows: Tensor, noise: Any) -> None:
        self.state = paths.state.select(rows).with_noise(noise)
        self.verifier_state = paths.verifier_state.select(rows)

    def spread(self, values: Tensor, missing: float = 0) -> Tensor:
        """Put values [P, ...] at the places of their paths, [B, n, ...], where others have stopped: `missing`."""
        places = values.new_full((len(self.rows) * self.n, *values.shape[1:]), missing)
        return places.index_put((self.number,), values).unflatten(0, (-1, self.n))

    def record(self, tokens: Tensor, scores: Tensor, kept: Tensor, drawn: bool = False) -> None:
        """Record a choice among c candidates of each path, as `Choice` has it (B = P), after its commit."""
        decided = None if self._decided is None else self._decided + 1
        self.trace.append(Choice(self.name, tokens, decided, scores, kept, drawn))

    def record_paths(self, scores: Tensor, kept: Tensor, drawn: bool = False) -> None:
        """Record a choice among the paths of each image, scores and kept [B, n], and count their values."""
        decided = None
        if self._decided is not None and not self.is_done:
            decided = self._decided.new_zeros(len(self.rows)).index_put((self.image,), self._decided + 1)
        self.trace.append(Choice(self.name, self.spread(self.state.tokens), decided, scores, kept, drawn))
        self.count(len(self))

    def count(self, values: int) -> None:
        """Count values that were asked of the verifier."""
        self.state.cost.verifier_calls += values

    def finish(self, rows: Tensor | None = None) -> Decoded:
        """Return the finished images, of paths `rows` [B] or of all."""
        state, start = self.state, torch.zeros(len(self))
        made = Decoded(state.tokens, state.features, state.cost, start, state.trajectory, log_probs=state.log_probs)
        return replace(made if rows is None else made.select(rows), trace=self.trace)
