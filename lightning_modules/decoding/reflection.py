"""Reflection (PARM++): judge the finished image, find what is not satisfactory, decode only that once more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.regions import Region
from lightning_modules.decoding.strategy import Decoded, Judges, Part, Strategy, judge_named
from lightning_modules.decoding.trace import ReflectionRound
from lightning_modules.rewards.verifier import Ability, Judge

_GROUPS = 4  # batches of a round, at most


@dataclass(frozen=True)
class Reflection(Strategy):
    """Reflection on the images of any strategy. Each image has its own Ω and stops on its own.

    An image stops when the judge is satisfied, when Ω is empty, when a round's image is nearer to the one before than
    `epsilon`, or after the last of `rounds`. The prompts of a round may carry what the judge finds wrong, as in PARM++
    (arXiv 2501.13926).

    Attributes:
        strategy, redecoder: makes the image; decodes the tokens of Ω anew, all others staying as they are.
        region_selector, judge: finds Ω; name of the judge that scores finished images.
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
    def parts(self) -> Mapping[str, Part]:
        return {"strategy": self.strategy, "redecoder": self.redecoder, "region_selector": self.region_selector}

    @property
    def start(self) -> tuple[Strategy, int]:
        return self.strategy, 1

    @property
    def judge_names(self) -> list[str]:
        return [self.judge, *(name for part in self.parts.values() for name in part.judge_names)]

    @property
    def images_at_once(self) -> int:
        return max(self.strategy.images_at_once, self.redecoder.images_at_once)

    def check_judges(self, judges: Judges) -> None:
        judge = judge_named(judges, self.judge, None if self.critique_template is None else Ability.CRITIQUE)
        if judge.best_score < self.stop_score < math.inf:
            never = f"reflection's stop_score={self.stop_score} is never reached"
            raise ValueError(f"{never}: {self.judge!r} gives log-values (.95: -.05)")
        super().check_judges(judges)

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        self.check_judges(judges)
        judge = judges[self.judge]
        image = self.strategy.decode(decoder, judges, request)
        scores = image.judged_by(judge, decoder, request.rows)
        trace, image = image.trace, replace(image, trace=())
        active = torch.arange(len(scores), device=image.tokens.device)  # images that have not stopped
        rounds: list[ReflectionRound] = []
        for number in range(self.strategy.reflection_rounds, self.reflection_rounds):
            active = active[scores[active] < self.stop_score]
            if len(active):
                seeds = [image_seed(seed, 0, number) for seed in request.seeds]  # each round has noise of its own
                asked, old = replace(request, seeds=seeds).select(active), image.select(active)
                region_mask = self.region_selector(decoder, judges, asked, old)
                found = region_mask.any(1).nonzero().squeeze(1)
                active, region_mask = active[found], region_mask[found]
                asked, old = asked.select(found), old.select(found)
            if not len(active):
                break
            new = self._redecode(decoder, judges, self._with_critique(decoder, judge, asked, old), old, region_mask)
            after = new.judged_by(judge, decoder, asked.rows)
            accepted = (after >= scores[active]) | (self.accept == "always")
            both = torch.stack([scores[active], after], 1)
            rounds.append(ReflectionRound(self.judge, active, region_mask, old.tokens, new.tokens, both, accepted))
            image = image.put(active[accepted], new.select(accepted.nonzero().squeeze(1)))
            scores[active[accepted]] = after[accepted]
            if self.epsilon:
                before, now = (decoder.image_tokenizer.decode(each.tokens).flatten(1) for each in (old, new))
                active = active[(now - before).norm(dim=1) >= self.epsilon]
        return _with_rounds(replace(image, trace=trace), rounds, scores >= self.stop_score)

    def _with_critique(self, decoder: Decoder, judge: Judge[Any], request: Request, image: Decoded) -> Request:
        """Put what the judge finds wrong with images into their prompts."""
        if self.critique_template is None:
            return request
        critiques = judge.critique(request.prompts, decoder.pixels(image.tokens, image.cost))
        pairs, told = zip(request.prompts, critiques, strict=True), self.critique_template.format
        texts = [told(prompt=prompt, critique=critique) for prompt, critique in pairs]
        return replace(request, rows=[{**row, "prompt": text} for row, text in zip(request.rows, texts, strict=True)])

    def _redecode(
        self, decoder: Decoder, judges: Judges, request: Request, image: Decoded, region_mask: Tensor
    ) -> Decoded:
        """Decode Ω of the images anew; those with Ω of like size go together, for a batch waits for its last."""
        sizes = region_mask.sum(1)
        request = replace(request, tokens=image.tokens, fixed_mask=~region_mask)
        for group in sizes.argsort(stable=True).chunk(min(_GROUPS, len(sizes.unique()))):
            new = self.redecoder.decode(decoder, judges, request.select(group))
            image.cost.add(new.cost)
            image = image.put(group, new)
        # About another prompt the decoder knows something else.
        return image if self.critique_template is None else replace(image, features=None)


def _with_rounds(image: Decoded, rounds: list[ReflectionRound], satisfied: Tensor) -> Decoded:
    """Add the rounds to the trace; to the stats their number for each image, those kept, and if it is satisfied [B]."""
    number, accepted = torch.zeros(2, len(image.tokens), device=image.tokens.device)
    for event in rounds:
        number[event.rows] += 1
        accepted[event.rows] += event.accepted
    stats = {**image.stats, "rounds": number, "accepted_rounds": accepted, "satisfied": satisfied.float()}
    # A judge has chosen these: the decoder alone has drawn nothing but the finished image.
    last = image.tokens.shape[1] if image.trajectory is None else image.trajectory.previews.shape[1] - 1
    first_unverified = image.first_unverified.index_fill(0, number.nonzero().squeeze(1).cpu(), last)
    return replace(image, trace=[*image.trace, *rounds], stats=stats, first_unverified=first_unverified)
