"""The paper's PARM (arXiv 2501.13926, section 3.3): paths are judged once they are clear, and stopped if hopeless."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, VerifierStrategy, judged, require_positive
from lightning_modules.decoding.trace import Choice
from lightning_modules.rewards.verifier import Ability, Judge


@dataclass(frozen=True)
class Potential(VerifierStrategy):
    """n paths an image. Every `stride` steps the judge sees the preview of each path until one is clear enough.

    The one verdict on a clear path says whether it has potential. Of those that have, the one that the judge likes best
    when finished is the image; if none has, the one whose verdict was the least certain no.

    Attributes:
        judge: name of a `StepJudge`.
        prune: a path without potential stops at once; if all of an image's do, the best of them continues from where it
            stopped. False completes all, as the released scripts do.
        reset_temperature: each path starts with the temperature of `sampling`; false leaves 0 of it to all but an
            image's first path, as the released scripts do.
        stride: steps between assessments; a step of a next-token decoder decides one token.
    """

    n: int
    judge: str
    prune: bool = True
    reset_temperature: bool = True
    stride: int = 1
    ability = Ability.UNFINISHED

    def __post_init__(self) -> None:
        require_positive("potential", n=self.n, stride=self.stride)

    @property
    def judge_names(self) -> list[str]:
        return [self.judge]

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        self.check_judges(judges)
        judge = judges[self.judge]
        paths = Paths(decoder, request, self.sampling, n=self.n)
        if not self.reset_temperature:
            paths.state = paths.state.without_order_noise(paths.number % self.n > 0)
        everyone, tokens = paths.number, paths.state.tokens.clone()
        potential = torch.full((len(paths),), torch.nan, device=tokens.device)  # of those not clear yet
        stopped: dict[int, Paths] = {}
        trace: list[Choice] = []
        while len(paths) and not paths.is_done:
            paths.commit(paths.propose())
            tokens[paths.number] = paths.state.tokens
            is_due = paths.state.step % self.stride == 0 or paths.is_done
            is_assessed = is_due and self._assess(judge, paths, potential)
            hopeless = potential[paths.number] < 0.5
            if self.prune and not paths.is_done and hopeless.any():
                stopped |= {int(paths.number[row]): paths.select(row) for row in hopeless.nonzero()}
                paths = paths.select((~hopeless).nonzero().squeeze(1))
            if is_assessed:
                trace.append(self._choice(tokens.clone(), potential.clone(), torch.isin(everyone, paths.number).long()))
        scores = torch.full_like(potential, torch.nan)
        if len(finalists := (potential >= 0.5).nonzero().squeeze(1)):
            rows = [request.rows[i] for i in (finalists // self.n).tolist()]
            scores[finalists] = judged(judge, decoder, rows, tokens[finalists], None, paths.state.cost).to(scores)
            paths.count(len(finalists))
        chosen, certainty = scores.view(-1, self.n), potential.nan_to_num(0).view(-1, self.n)
        has_finalists = ~chosen.isnan().all(1, keepdim=True)
        best = torch.where(has_finalists, chosen.nan_to_num(-torch.inf), certainty).argmax(1)
        winner = everyone[:: self.n] + best
        for path in stopped.keys() & {*winner.tolist()}:
            while not stopped[path].is_done:
                stopped[path].commit(stopped[path].propose())
            tokens[path] = stopped[path].state.tokens[0]
        trace.append(self._choice(tokens, scores, one_hot(best, self.n)))
        return Decoded(tokens[winner], None, paths.state.cost, torch.zeros(len(winner)), trace=trace)

    def _assess(self, judge: Judge[Any], paths: Paths, potential: Tensor) -> bool:
        """Ask about the paths that were not clear so far, if any, and write down the `potential` of those that are."""
        unclear = potential[paths.number].isnan().nonzero().squeeze(1)
        if not len(unclear):
            return False
        prompts = [paths.rows[i]["prompt"] for i in paths.image[unclear.cpu()].tolist()]
        pixels = paths.decoder.preview(paths.state.select(unclear))
        clear, verdicts = judge.clear_and_potential(prompts, pixels)
        potential[paths.number[unclear]] = torch.where(clear >= 0.5, verdicts, torch.nan).to(potential)
        paths.count(2 * len(unclear))
        return True

    def _choice(self, tokens: Tensor, scores: Tensor, kept: Tensor) -> Choice:
        """A choice among all paths, from their tokens [B n, T], scores [B n] and whether each is kept."""
        shape = -1, self.n
        return Choice(self.judge, tokens.unflatten(0, shape), None, scores.view(shape), kept.view(shape))
