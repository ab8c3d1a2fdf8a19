"""The paper's PARM (arXiv 2501.13926, section 3.3): paths are judged once they are clear, and stopped if hopeless."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Cost, Decoder, DecodingState, Request
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, step_judge_named
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

    sampling: Any
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
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        judge = step_judge_named(judges, self.judge)
        repeated = request.repeat(self.n)
        state = decoder.begin(repeated, self.sampling)
        everyone = paths = torch.arange(len(repeated.rows), device=state.tokens.device)
        if not self.reset_temperature:
            state = state.without_order_noise(paths % self.n > 0)
        doubt = torch.full((len(paths),), _NEVER_CLEAR, device=paths.device)  # P(no) of each path's verdict
        clear = torch.zeros_like(paths, dtype=torch.bool)
        tokens = state.tokens.clone()
        stopped: dict[int, DecodingState] = {}
        trace: list[Choice] = []
        shape = len(request.rows), self.n
        while len(paths) and not state.is_done:
            _step(decoder, state)
            unclear = (~clear[paths]).nonzero().squeeze(1)
            if len(unclear):
                judged = paths[unclear]
                pixels = decoder.preview(state.select(unclear))
                is_clear, potential = judge.clear_and_potential(repeated.select(judged).prompts, pixels)
                state.cost.verifier_calls += 2 * len(judged)
                now = (is_clear >= 0.5).to(paths.device)
                clear[judged] = now
                doubt[judged] = torch.where(now, 1 - potential.to(doubt), doubt[judged])
            tokens[paths] = state.tokens
            if self.prune and not state.is_done:
                stop = clear[paths] & (doubt[paths] > 0.5)
                for i in stop.nonzero().squeeze(1).tolist():
                    stopped[int(paths[i])] = state.select(torch.tensor([i], device=paths.device))
                paths, state = paths[~stop], state.select((~stop).nonzero().squeeze(1))
            if len(unclear):
                verdicts = (1 - doubt).masked_fill(~clear, torch.nan).view(shape)
                left = torch.isin(everyone, paths).long().view(shape)
                trace.append(Choice(self.judge, tokens.view(*shape, -1).clone(), None, verdicts, left))
        scores = self._final_scores(decoder, judge, repeated, tokens, clear & (doubt <= 0.5), state.cost)
        won = torch.where(
            scores.isnan().all(1, keepdim=True), -doubt.view(shape), scores.nan_to_num(-torch.inf)
        ).argmax(1)
        winners = everyone[:: self.n] + won
        for path in winners.tolist():
            if path in stopped:
                while not stopped[path].is_done:
                    _step(decoder, stopped[path])
                tokens[path] = stopped[path].tokens[0]
        trace.append(Choice(self.judge, tokens.view(*shape, -1), None, scores, one_hot(won, self.n)))
        return Decoded(tokens[winners], None, state.cost, torch.zeros(shape[0]), trace=trace)

    def _final_scores(
        self, decoder: Decoder, judge: StepJudge, repeated: Request, tokens: Tensor, finalists: Tensor, cost: Cost
    ) -> Tensor:
        """What the judge says of finished images, [B, n], NaN of those that are no finalists."""
        scores = torch.full(finalists.shape, torch.nan, device=tokens.device)
        chosen = finalists.nonzero().squeeze(1)
        if len(chosen):
            pixels = decoder.image_tokenizer.decode(tokens[chosen])
            scores[chosen] = judge(repeated.select(chosen).rows, pixels).to(scores)
            cost.verifier_calls += len(chosen)
        return scores.view(-1, self.n)


def _step(decoder: Decoder, state: DecodingState) -> None:
    """Continue by one step, with the only candidate."""
    only = torch.zeros(len(state.tokens), dtype=torch.int64, device=state.tokens.device)
    decoder.commit(state, decoder.propose(state, 1), only)
