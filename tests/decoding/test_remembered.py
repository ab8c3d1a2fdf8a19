"""Images from which several strategies start are made once, and everything else is as if they were made each time."""

from dataclasses import replace

import pytest
import torch

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import Sampling, image_seed
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import Region, TokenConfidence
from lightning_modules.decoding.remembered import remembering
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Likelihood
from tests.helpers.models import make_parm

SEEDS = [image_seed(1, i) for i in range(12)]
decoded: list[int] = []  # images of each time that `Counted` was at work


class Counted(Sample):
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        decoded.append(len(request.rows))
        return super().decode(decoder, judges, request)


PLAIN = Counted(Sampling(guidance=0.5))
BEST = BestOfN(PLAIN, 2, "parm")
STRATEGIES: dict[str, Strategy] = {
    "plain": PLAIN,
    "best": BEST,
    "likeliest": BestOfN(PLAIN, 2, "likelihood"),
    "of_three": BestOfN(PLAIN, 3, "likelihood"),
    "reflection": Reflection(BEST, PLAIN, Region(TokenConfidence(), quantile=0.5), rounds=1),
}


@pytest.fixture
def judges(parm: PARM) -> Judges:
    decoded.clear()
    return {"parm": parm, "likelihood": Likelihood()}


def test_shared_images_are_made_once_and_nothing_else_changes(
    decoder: CompactDecoder, rows: list, judges: Judges
) -> None:
    request = Request(rows, SEEDS[: len(rows)])
    alone = {name: strategy.decode(decoder, judges, request) for name, strategy in STRATEGIES.items()}
    apart = len(decoded)
    decoded.clear()
    shared = remembering({name: (strategy, judges) for name, strategy in STRATEGIES.items()})
    for name, (strategy, own) in shared.items():
        image = strategy.decode(decoder, own, request)
        assert torch.equal(image.tokens, alone[name].tokens)
        assert replace(image.cost, seconds=0) == alone[name].cost
        assert len(image.trace) == len(alone[name].trace)
        assert (image.cost.seconds > 0) == (name in ("likeliest", "reflection"))
    assert decoded.count(2 * len(rows)) == 1  # for best, likeliest, and what reflection begins with
    assert len(decoded) == apart - 2


def test_other_judges_make_other_images(decoder: CompactDecoder, rows: list, judges: Judges) -> None:
    untrained = {**judges, "parm": make_parm(decoder)}
    runs = remembering({"before": (BEST, untrained), "after": (BEST, judges)})
    request = Request(rows, SEEDS[: len(rows)])
    for strategy, own in runs.values():
        before = BEST.decode(decoder, own, request)
        assert torch.equal(strategy.decode(decoder, own, request).tokens, before.tokens)
    again = runs["after"][0].decode(decoder, judges, Request(rows, SEEDS[-len(rows) :]))
    assert torch.equal(again.tokens, BEST.decode(decoder, judges, Request(rows, SEEDS[-len(rows) :])).tokens)
