"""Reflection (PARM++): judge the finished image, find what is not satisfactory, decode only that once more."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.regions import Region
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judge_able, judge_named, judged
from lightning_modules.decoding.trace import ReflectionRound
from lightning_modules.rewards.verifier import Ability, Judge

_GROUPS = 4  # batches of a round, at most


@dataclass(frozen=True)
class Reflection(Strategy):
    """Reflection on the images of any strategy. Each image has its own Ω and stops on its own.

    An image stops when the judge is satisfied, when Ω is empty, when a round's image is nearer to the one before than
    `epsilon`, or after the last round. The prompts of a round may carry what the judge finds wrong, as PARM++ does
    (arXiv 2501.13926).

    Attributes:
        strategy: makes the image.
        redecoder: decodes the tokens of Ω anew, all others staying as they are.
        region_selector: finds Ω.
        rounds: R, at most.
        judge: name of the judge that scores finished images.
        stop_score: images of at least this score are left as they are (of verifiers: a log-value); default: none is.
        accept: keep a round's image only if the judge's score does not fall, or always, which is the method's letter.
        epsilon: of ‖I(r) - I(r-1)‖₂ over pixels in [0, 1]; 0 never stops an image.
        critique_template: the prompt of a round, made of {prompt} and {critique}: what the judge finds wrong.
    """

    strategy: Strategy
    redecoder: Strategy
    region_selector: Region
    rounds: int
    judge: str = "parm"
    stop_score: float = math.inf
    accept: Literal["better", "always"] = "better"
    epsilon: float = 0.0
    critique_template: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"reflection needs at least 1 round, not {self.rounds}")
        if self.accept not in ("better", "always"):
            raise ValueError(f"accept must be 'better' or 'always', not {self.accept!r}")

    @property
    def reflection_rounds(self) -> int:
        return self.strategy.reflection_rounds + self.rounds

    @property
    def judge_names(self) -> list[str]:
        scorer = self.region_selector.scorer
        return [self.judge, *self.strategy.judge_names, *self.redecoder.judge_names, *scorer.judge_names]

    @property
    def images_at_once(self) -> int:
        return max(self.strategy.images_at_once, self.redecoder.images_at_once)

    def check_judges(self, judges: Judges) -> None:
        self._judge(judges)
        for part in (self.strategy, self.redecoder, self.region_selector.scorer):
            part.check_judges(judges)

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        judge = self._judge(judges)
        image = self.strategy.decode(decoder, judges, request)
        scores = self._score(decoder, judge, request, image)
        trace, image = image.trace, replace(image, trace=())
        active = torch.arange(len(scores), device=image.tokens.device)  # images that have not stopped
        rounds: list[ReflectionRound] = []
        for number in range(self.strategy.reflection_rounds, self.reflection_rounds):
            active = active[scores[active] < self.stop_score]
            if len(active):
                active, region_mask = self._find_regions(decoder, judges, _of_round(request, number), image, active)
            if not len(active):
                break
            asked, old = _of_round(request, number).select(active), image.select(active)
            critique = self._with_critique(decoder, judge, asked, old)
            new = self._redecode(decoder, judges, critique, old, region_mask)
            after = self._score(decoder, judge, asked, new)
            accepted = (after >= scores[active]) | (self.accept == "always")
            both = torch.stack([scores[active], after], 1)
            rounds.append(ReflectionRound(self.judge, active, region_mask, old.tokens, new.tokens, both, accepted))
            image = image.put(active[accepted], new.select(accepted.nonzero().squeeze(1)))
            scores[active[accepted]] = after[accepted]
            if self.epsilon:
                before, now = (decoder.image_tokenizer.decode(each.tokens).flatten(1) for each in (old, new))
                active = active[(now - before).norm(dim=1) >= self.epsilon]
        return _with_rounds(replace(image, trace=trace), rounds, scores >= self.stop_score)

    def _judge(self, judges: Judges) -> Judge[Any]:
        """Look up the judge; raises ValueError if it cannot do what the settings ask."""
        judge = judge_named(judges, self.judge)
        if self.critique_template is not None:
            judge_able(judges, self.judge, Ability.CRITIQUE)
        if judge.best_score < self.stop_score < math.inf:
            raise ValueError(
                f"reflection's stop_score={self.stop_score} is never reached: {self.judge!r} gives log-values "
                "(.95: -.05)"
            )
        return judge

    def _score(self, decoder: Decoder, judge: Judge[Any], request: Request, image: Decoded) -> Tensor:
        """Score finished images, [B]."""
        image.cost.verifier_calls += len(image.tokens)
        return judged(judge, decoder, request.rows, image.tokens, image.features)

    def _find_regions(
        self, decoder: Decoder, judges: Judges, request: Request, image: Decoded, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Find Ω of images `rows`: those that have any [b], and Ω of these, bool [b, T]."""
        request = request.select(rows)
        region_mask = self.region_selector(decoder, judges, request, image.select(rows))
        if request.fixed_mask is not None:
            region_mask &= ~request.fixed_mask
        lacking = region_mask.any(1)
        return rows[lacking], region_mask[lacking]

    def _with_critique(self, decoder: Decoder, judge: Judge[Any], request: Request, image: Decoded) -> Request:
        """Put what the judge finds wrong with images into their prompts."""
        if self.critique_template is None:
            return request
        critiques = judge.critique(request.prompts, decoder.image_tokenizer.decode(image.tokens))
        rows = [
            {**row, "prompt": self.critique_template.format(prompt=row["prompt"], critique=text)}
            for row, text in zip(request.rows, critiques, strict=True)
        ]
        return replace(request, rows=rows)

    def _redecode(
        self, decoder: Decoder, judges: Judges, request: Request, image: Decoded, region_mask: Tensor
    ) -> Decoded:
        """Decode Ω of the images anew; those with Ω of like size go together, for a batch waits for its last."""
        sizes = region_mask.sum(1)
        groups = min(_GROUPS, len(sizes.unique()))
        request = replace(request, tokens=image.tokens, fixed_mask=~region_mask)
        for group in sizes.argsort(stable=True).chunk(groups):
            new = self.redecoder.decode(decoder, judges, request.select(group))
            image.cost.add(new.cost)
            image = image.put(group, new)
        # About another prompt the decoder knows something else.
        return image if self.critique_template is None else replace(image, features=None)


def _of_round(request: Request, number: int) -> Request:
    """The request with the noise of a round."""
    return replace(request, seeds=[image_seed(seed, 0, number) for seed in request.seeds])


def _with_rounds(image: Decoded, rounds: list[ReflectionRound], satisfied: Tensor) -> Decoded:
    """Add the rounds to the trace, and to the stats how many there were of each image and how many it kept.

    `satisfied` [B], whether the judge was at the end, is added as well.
    """
    number, accepted = torch.zeros(2, len(image.tokens), device=image.tokens.device)
    for event in rounds:
        number[event.rows] += 1
        accepted[event.rows] += event.accepted
    stats = {**image.stats, "rounds": number, "accepted_rounds": accepted, "satisfied": satisfied.float()}
    reflected = image.all_chosen(number.nonzero().squeeze(1))
    return replace(reflected, trace=[*image.trace, *rounds], stats=stats)
