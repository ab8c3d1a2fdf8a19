"""Best-of-n: decode n images of each prompt and keep the one that a judge likes best (the paper's ORM baseline)."""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judge_named, judged
from lightning_modules.decoding.trace import Choice


@dataclass(frozen=True)
class BestOfN(Strategy):
    """Wraps any strategy.

    Attributes:
        strategy: makes the candidates; the first has the image's own seed, so it is what `strategy` alone makes.
        n: candidates an image.
        judge: name of a verifier (its value of the finished image) or of a reward.
    """

    strategy: Strategy
    n: int
    judge: str

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"best-of-n needs n of at least 1, not {self.n}")

    @property
    def judge_names(self) -> list[str]:
        return [self.judge, *self.strategy.judge_names]

    @property
    def images_at_once(self) -> int:
        return self.n * self.strategy.images_at_once

    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        judge = judge_named(judges, self.judge)
        repeated = request.repeat(self.n)
        all_images = self.strategy.decode(decoder, judges, repeated)
        scores = judged(judge, decoder, repeated.rows, all_images.tokens, all_images.features).view(-1, self.n)
        all_images.cost.verifier_calls += scores.numel()
        winner = scores.argmax(1)
        tokens = all_images.tokens.unflatten(0, scores.shape)
        choice = Choice(self.judge, tokens, None, scores, one_hot(winner, self.n))
        image = all_images.select(torch.arange(0, scores.numel(), self.n, device=winner.device) + winner)
        return replace(image, trace=[*image.trace, choice])
