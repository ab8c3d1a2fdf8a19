"""Best-of-n: decode n images of each prompt and keep the one of the highest score."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judge_named, require_positive
from lightning_modules.decoding.trace import Choice


@dataclass(frozen=True)
class BestOfN(Strategy):
    """Best-of-n of any strategy: the outcome reward model (ORM) of the paper, arXiv 2501.13926.

    Attributes:
        strategy: makes the n candidates of each image; the first is what it makes alone, from the image's own seed.
        judge: name of the judge that scores finished images.
    """

    strategy: Strategy
    n: int
    judge: str

    def __post_init__(self) -> None:
        require_positive("best-of-n", n=self.n)

    @property
    def parts(self) -> Mapping[str, Strategy]:
        return {"strategy": self.strategy}

    @property
    def start(self) -> tuple[Strategy, int]:
        return self.strategy, self.n

    @property
    def judge_names(self) -> list[str]:
        return [self.judge, *self.strategy.judge_names]

    @property
    def images_at_once(self) -> int:
        return self.n * self.strategy.images_at_once

    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        judge = judge_named(judges, self.judge)
        repeated = request.repeat(self.n)
        images = self.strategy.decode(decoder, judges, repeated)
        scores = images.judged_by(judge, decoder, repeated.rows).view(-1, self.n)
        winner = scores.argmax(1)
        choice = Choice(self.judge, images.tokens.unflatten(0, scores.shape), None, scores, one_hot(winner, self.n))
        image = images.select(torch.arange(0, scores.numel(), self.n, device=winner.device) + winner)
        return replace(image, trace=[*image.trace, choice])
