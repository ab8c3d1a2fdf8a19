"""Reflection (PARM++): look at the finished image, find what is not satisfactory, decode only that again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.regions import Region
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judge_named, judged
from lightning_modules.decoding.trace import Choice, Round
from lightning_modules.rewards.verifier import Critic, Verifier

T = TypeVar("T")
_GROUPS = 4  # batches of a round, at most


@dataclass(frozen=True)
class Reflection(Strategy):
    """Wraps any strategy. Each image has its own Ω and stops on its own; those that are finished leave the batch.

    An image is finished when the judge is satisfied, when Ω is empty, when a round's image is nearer to the one before
    than `epsilon`, or after the last round.

    Attributes:
        strategy: makes the image.
        again: decodes the tokens of Ω again, all others staying as they are.
        where: finds Ω.
        rounds: R, at most.
        judge: name of a verifier or reward that scores finished images.
        satisfied: score from which on an image is left as it is (of verifiers: a log-value); default: none is.
        accept: keep a round's image only if the judge's score does not fall, or always, which is the method's letter.
        epsilon: of ‖I(r) - I(r-1)‖₂ over pixels in [0, 1]; 0 never stops an image.
        tell: the prompt of a round, from {prompt} and {critique}, what a judge that is a `Critic` finds wrong.
    """

    strategy: Strategy
    again: Strategy
    where: Region
    rounds: int
    judge: str = "parm"
    satisfied: float = math.inf
    accept: Literal["better", "always"] = "better"
    epsilon: float = 0.0
    tell: str | None = None

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
        return [self.judge, *self.strategy.judge_names, *self.again.judge_names, *self.where.judge_names]

    @property
    def images_at_once(self) -> int:
        return max(self.strategy.images_at_once, self.again.images_at_once)

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
        judge = judge_named(judges, self.judge)
        if self.tell is not None and not isinstance(judge, Critic):
            raise ValueError(f"judge {self.judge!r} cannot say what is wrong, which reflection with `tell` asks it")
        if isinstance(judge, Verifier) and 0 < self.satisfied < math.inf:
            raise ValueError(
                f"reflection's satisfied={self.satisfied} is never reached: {self.judge!r} gives log-values (.95: -.05)"
            )
        image = self.strategy.decode(decoder, judges, prompts, seeds, tokens, keep)
        scores = judged(judge, decoder, prompts, image.tokens, image.evidence)
        image.cost.verifier_calls += len(prompts)
        left = torch.arange(len(prompts), device=image.tokens.device)  # images that are not finished
        trace: list[Choice | Round] = list(image.trace)
        image = replace(image, trace=())
        rounds, accepted_rounds = (torch.zeros_like(scores) for _ in range(2))
        for number in range(self._first, self._first + self.rounds):
            left = left[scores[left] < self.satisfied]
            if not len(left):
                break
            drawn = [image_seed(seed, 0, number) for seed in _pick(seeds, left)]
            omega = self.where(decoder, judges, _pick(prompts, left), drawn, image.select(left))
            if keep is not None:
                omega &= ~keep[left]
            lacking = omega.any(1).nonzero().squeeze(1)
            if not len(lacking):
                break
            left, omega, drawn = left[lacking], omega[lacking], _pick(drawn, lacking)
            asked, old = _pick(prompts, left), image.select(left)
            new = self._again(decoder, judges, self._told(decoder, judge, asked, old), drawn, old, omega)
            after = judged(judge, decoder, asked, new.tokens, new.evidence)
            image.cost.verifier_calls += len(left)
            accepted = (after >= scores[left]) | (self.accept == "always")
            both = torch.stack([scores[left], after], 1)
            trace.append(Round(self.judge, left, omega, old.tokens, new.tokens, both, accepted))
            rounds[left] += 1
            accepted_rounds[left] += accepted
            taken = accepted.nonzero().squeeze(1)
            image = image.put(left[taken], new.select(taken))
            scores[left[taken]] = after[taken]
            if self.epsilon:
                before, now = (decoder.image_tokenizer.decode(each.tokens).flatten(1) for each in (old, new))
                left = left[(now - before).norm(dim=1) >= self.epsilon]
        notes = {**image.notes, "rounds": rounds, "accepted_rounds": accepted_rounds}
        return replace(image.all_chosen(rounds.nonzero().squeeze(1)), trace=trace, notes=notes)

    def _again(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
        omega: Tensor,
    ) -> Decoded:
        """The images with Ω decoded again; those with Ω of like size go together, for a batch waits for its last."""
        sizes = omega.sum(1)
        groups = min(_GROUPS, len(sizes.unique()))
        for group in sizes.argsort(stable=True).chunk(groups):
            kept = image.tokens[group], ~omega[group]
            new = self.again.decode(decoder, judges, _pick(prompts, group), _pick(seeds, group), *kept)
            image.cost.add(new.cost)
            image = image.put(group, new)
        # About another prompt the decoder knows something else.
        return image if self.tell is None else replace(image, evidence=None)

    def _told(
        self, decoder: Decoder, judge: Any, prompts: Sequence[Mapping[str, Any]], image: Decoded
    ) -> Sequence[Mapping[str, Any]]:
        """The prompts of a round, with what the judge finds wrong."""
        if self.tell is None:
            return prompts
        critiques = judge.critique([row["prompt"] for row in prompts], decoder.image_tokenizer.decode(image.tokens))
        pairs = zip(prompts, critiques, strict=True)
        return [{**row, "prompt": self.tell.format(prompt=row["prompt"], critique=text)} for row, text in pairs]


def _pick(given: Sequence[T], rows: Tensor) -> list[T]:
    return [given[i] for i in rows.tolist()]
