"""The paper's PARM (arXiv 2501.13926, section 3.3): paths are judged once they are clear, and stopped if hopeless."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.mask_state import MaskState
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.decoding.strategy import (
    Decoded,
    Judges,
    Strategy,
    candidate_seeds,
    previewing,
    step_judge_named,
)
from lightning_modules.decoding.trace import Choice
from lightning_modules.rewards.verifier import StepJudge

_NEVER_CLEAR = 1.0  # the P(no) of paths that were never judged


@dataclass(frozen=True)
class Potential(Strategy):
    """n paths an image. After every step the preview of each is looked at until it is clear enough to be judged.

    The one verdict on a clear path says whether it has potential. Of those that have, the one that the judge likes best
    when finished is the image; if none has, the one whose verdict was the least certain no.

    Attributes:
        sampling: how paths are decoded.
        n: paths.
        judge: name of a `StepJudge`.
        prune: a path without potential stops at once, and its place in the batch is free; if all of an image's do, the
            best of them goes on from where it stopped. False completes all, as the released scripts do.
        reset_temperature: each path starts with the temperature of `sampling`; false leaves 0 of it to all but an
            image's first path, as the released scripts do.
    """

    sampling: MaskSampling
    n: int
    judge: str
    prune: bool = True
    reset_temperature: bool = True

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"potential paths need n of at least 1, not {self.n}")

    @property
    def judge_names(self) -> list[str]:
        return [self.judge]

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
        judge = step_judge_named(judges, self.judge)
        decoder = previewing(decoder, "potential paths")
        rows = [row for row in prompts for _ in range(self.n)]
        noise = decoder.noise(candidate_seeds(seeds, self.n), 1, self.sampling)
        kept = (part if part is None else part.repeat_interleave(self.n, 0) for part in (tokens, keep))
        state = decoder.begin([row["prompt"] for row in rows], noise, self.sampling, *kept)
        paths = torch.arange(len(rows), device=state.tokens.device)
        if not self.reset_temperature:
            state.temperature = (paths % self.n == 0)[:, None].float()
        doubt = torch.full((len(rows),), _NEVER_CLEAR, device=paths.device)  # P(no) of each path's verdict
        clear = torch.zeros_like(paths, dtype=torch.bool)
        finished = state.tokens.clone()
        stopped: dict[int, MaskState] = {}
        trace: list[Choice] = []
        shape = len(prompts), self.n
        while len(paths) and not state.done:
            _step(decoder, state)
            unclear = (~clear[paths]).nonzero().squeeze(1)
            if len(unclear):
                judged = paths[unclear]
                pixels = decoder.image_tokenizer.decode(state.tokens[unclear])
                is_clear, potential = judge.clear_and_potential([rows[i]["prompt"] for i in judged.tolist()], pixels)
                state.cost.verifier_calls += 2 * len(judged)
                now = (is_clear >= 0.5).to(paths.device)
                clear[judged] = now
                doubt[judged] = torch.where(now, 1 - potential.to(doubt), doubt[judged])
            finished[paths] = state.tokens
            if self.prune and not state.done:
                hopeless = clear[paths] & (doubt[paths] > 0.5)
                for i in hopeless.nonzero().squeeze(1).tolist():
                    stopped[int(paths[i])] = state.select(torch.tensor([i], device=paths.device))
                paths, state = paths[~hopeless], state.select((~hopeless).nonzero().squeeze(1))
            if len(unclear):
                verdicts = (1 - doubt).masked_fill(~clear, torch.nan).view(shape)
                going = torch.zeros_like(clear, dtype=torch.int64).index_fill(0, paths, 1).view(shape)
                trace.append(Choice(self.judge, finished.view(*shape, -1).clone(), None, verdicts, going))
        winners, opinions = self._winners(decoder, judge, rows, finished, clear & (doubt <= 0.5), doubt, state)
        for path in winners.tolist():
            if path in stopped:
                while not stopped[path].done:
                    _step(decoder, stopped[path])
                finished[path] = stopped[path].tokens[0]
        won = one_hot(winners % self.n, self.n)
        trace.append(Choice(self.judge, finished.view(*shape, -1), None, opinions.view(shape), won))
        return Decoded(finished[winners], None, state.cost, torch.zeros(len(prompts)), trace=trace)

    def _winners(
        self,
        decoder: MaskTokenDecoder,
        judge: StepJudge,
        rows: Sequence[Mapping[str, Any]],
        finished: Tensor,
        hopeful: Tensor,
        doubt: Tensor,
        state: MaskState,
    ) -> tuple[Tensor, Tensor]:
        """The path [B] of each image that wins, and what the judge says of the finalists, [B * n], NaN of others."""
        opinions = torch.full_like(doubt, torch.nan)
        finalists = hopeful.nonzero().squeeze(1)
        if len(finalists):
            pixels = decoder.image_tokenizer.decode(finished[finalists])
            opinions[finalists] = judge([rows[i] for i in finalists.tolist()], pixels).to(opinions)
            state.cost.verifier_calls += len(finalists)
        final, doubt = opinions.nan_to_num(-torch.inf).view(-1, self.n), doubt.view(-1, self.n)
        any_hope = hopeful.view(-1, self.n).any(1, keepdim=True)
        first = torch.arange(0, len(rows), self.n, device=final.device)
        return first + torch.where(any_hope, final, -doubt).argmax(1), opinions


def _step(decoder: MaskTokenDecoder, state: MaskState) -> None:
    """Go on by one step, with the only candidate."""
    only = torch.zeros(len(state.tokens), dtype=torch.int64, device=state.tokens.device)
    decoder.commit(state, decoder.propose(state, 1), only)
