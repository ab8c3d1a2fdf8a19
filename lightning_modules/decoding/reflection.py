"""Reflection (PARM++): look at the finished image, find what is not satisfactory, decode only that again."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.regions import Region
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judge_named, judged
from lightning_modules.decoding.trace import Choice, ReflectionRound
from lightning_modules.rewards.verifier import Critic, Judge, TokenVerifier

_GROUPS = 4  # batches of a round, at most


@dataclass(frozen=True)
class Reflection(Strategy):
    """Wraps any strategy. Each image has its own Ω and stops on its own; those that are finished leave the batch.

    An image is finished when the judge is satisfied, when Ω is empty, when a round's image is nearer to the one before
    than `epsilon`, or after the last round.

    Attributes:
        strategy: makes the image.
        redecoder: decodes the tokens of Ω again, all others staying as they are.
        region_selector: finds Ω.
        rounds: R, at most.
        judge: name of a verifier or reward that scores finished images.
        stop_score: score from which on an image is left as it is (of verifiers: a log-value); default: none is.
        accept: keep a round's image only if the judge's score does not fall, or always, which is the method's letter.
        epsilon: of ‖I(r) - I(r-1)‖₂ over pixels in [0, 1]; 0 never stops an image.
        critique_template: the prompt of a round, made of {prompt} and {critique}: what a `Critic` finds wrong.
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
    def _first(self) -> int:
        """Number of the first round: on from those of a reflection that is wrapped, whose noise would come again."""
        return self.strategy._first + self.strategy.rounds if isinstance(self.strategy, Reflection) else 0

    @property
    def judge_names(self) -> list[str]:
        return [self.judge, *self.strategy.judge_names, *self.redecoder.judge_names, *self.region_selector.judge_names]

    @property
    def images_at_once(self) -> int:
        return max(self.strategy.images_at_once, self.redecoder.images_at_once)

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        judge = judge_named(judges, self.judge)
        if self.critique_template is not None and not isinstance(judge, Critic):
            raise ValueError(
                f"judge {self.judge!r} cannot say what is wrong, which reflection with `critique_template` asks it"
            )
        if isinstance(judge, TokenVerifier) and 0 < self.stop_score < math.inf:
            raise ValueError(
                f"reflection's stop_score={self.stop_score} is never reached: {self.judge!r} gives log-values "
                "(.95: -.05)"
            )
        image = self.strategy.decode(decoder, judges, request)
        scores = judged(judge, decoder, request.rows, image.tokens, image.features)
        image.cost.verifier_calls += len(scores)
        left = torch.arange(len(scores), device=image.tokens.device)  # images that are not finished
        trace: list[Choice | ReflectionRound] = list(image.trace)
        image = replace(image, trace=())
        rounds, accepted_rounds = (torch.zeros_like(scores) for _ in range(2))
        for number in range(self._first, self._first + self.rounds):
            left = left[scores[left] < self.stop_score]
            if not len(left):
                break
            asked = request.select(left)
            asked = replace(asked, seeds=[image_seed(seed, 0, number) for seed in asked.seeds])
            region_mask = self.region_selector(decoder, judges, asked, image.select(left))
            if asked.fixed_mask is not None:
                region_mask &= ~asked.fixed_mask
            lacking = region_mask.any(1).nonzero().squeeze(1)
            if not len(lacking):
                break
            left, region_mask, asked = left[lacking], region_mask[lacking], asked.select(lacking)
            old = image.select(left)
            new = self._again(decoder, judges, self._told(decoder, judge, asked, old), old, region_mask)
            after = judged(judge, decoder, asked.rows, new.tokens, new.features)
            image.cost.verifier_calls += len(left)
            accepted = (after >= scores[left]) | (self.accept == "always")
            both = torch.stack([scores[left], after], 1)
            trace.append(ReflectionRound(self.judge, left, region_mask, old.tokens, new.tokens, both, accepted))
            rounds[left] += 1
            accepted_rounds[left] += accepted
            taken = accepted.nonzero().squeeze(1)
            image = image.put(left[taken], new.select(taken))
            scores[left[taken]] = after[taken]
            if self.epsilon:
                before, now = (decoder.image_tokenizer.decode(each.tokens).flatten(1) for each in (old, new))
                left = left[(now - before).norm(dim=1) >= self.epsilon]
        stats = {**image.stats, "rounds": rounds, "accepted_rounds": accepted_rounds}
        return replace(image.all_chosen(rounds.nonzero().squeeze(1)), trace=trace, stats=stats)

    def _again(
        self, decoder: Decoder, judges: Judges, request: Request, image: Decoded, region_mask: Tensor
    ) -> Decoded:
        """The images with Ω decoded again; those with Ω of like size go together, for a batch waits for its last."""
        sizes = region_mask.sum(1)
        groups = min(_GROUPS, len(sizes.unique()))
        request = replace(request, tokens=image.tokens, fixed_mask=~region_mask)
        for group in sizes.argsort(stable=True).chunk(groups):
            new = self.redecoder.decode(decoder, judges, request.select(group))
            image.cost.add(new.cost)
            image = image.put(group, new)
        # About another prompt the decoder knows something else.
        return image if self.critique_template is None else replace(image, features=None)

    def _told(self, decoder: Decoder, judge: Judge, request: Request, image: Decoded) -> Request:
        """The prompts of a round, with what the judge finds wrong."""
        if self.critique_template is None:
            return request
        assert isinstance(judge, Critic)
        critiques = judge.critique(request.prompts, decoder.image_tokenizer.decode(image.tokens))
        rows = [
            {**row, "prompt": self.critique_template.format(prompt=row["prompt"], critique=text)}
            for row, text in zip(request.rows, critiques, strict=True)
        ]
        return replace(request, rows=rows)
