"""Decoding by step scores alone, with a judge that counts."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.showo import ShowO
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.verifier import StepJudge
from tests.helpers.models import make_showo

SAMPLING = MaskSampling(steps=5)
ROWS: list[Mapping[str, Any]] = [{"prompt": "1 2 3"}, {"prompt": "4 5"}]
SEEDS = [3, 4]


class Total(StepJudge):
    """Likes large codes; remembers what it was shown."""

    def cache_key(self):
        return type(self).__name__

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert len(prompts) == len(pixels)
        self.shown.append(pixels)
        return torch.zeros(len(pixels)), pixels.sum((1, 2, 3))

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        raise AssertionError("finished images are not judged")


@pytest.fixture(scope="module")
def previewing() -> ShowO:
    """A random Show-o whose pixels are its tokens."""
    torch.manual_seed(0)
    decoder = make_showo()
    decoder.image_tokenizer.decode = lambda tokens: tokens.float()[:, None, None]  # type: ignore[method-assign]
    return decoder


def test_the_candidate_with_the_highest_step_score_goes_on(previewing: ShowO) -> None:
    judge, k = Total(), 4
    decoded = Verified(SAMPLING, k, verifier="judge").decode(previewing, {"judge": judge}, Request(ROWS, SEEDS))
    assert len(judge.shown) == SAMPLING.steps
    final = judge.shown[-1].view(len(ROWS), k, -1)
    best = final.sum(-1).argmax(1)
    assert torch.equal(decoded.tokens, final[torch.arange(len(ROWS)), best].long())
    assert decoded.cost.decoder_passes == 2 * len(ROWS) * SAMPLING.steps  # one pass serves all candidates
    assert decoded.cost.verifier_calls == len(ROWS) * k * SAMPLING.steps
    plain = Sample(SAMPLING).decode(previewing, {}, Request(ROWS, SEEDS))
    assert (decoded.tokens.sum(1) > plain.tokens.sum(1)).all()


def test_one_candidate_is_plain_sampling(previewing: ShowO) -> None:
    alone = Verified(SAMPLING, 1, verifier="judge").decode(previewing, {"judge": Total()}, Request(ROWS, SEEDS))
    assert torch.equal(alone.tokens, Sample(SAMPLING).decode(previewing, {}, Request(ROWS, SEEDS)).tokens)


def test_judges_without_memory_see_the_end_of_each_block_alone(previewing: ShowO) -> None:
    judge, k = Total(), 4
    strategy = Verified(SAMPLING, k, stride=2, verifier="judge")
    decoded = strategy.decode(previewing, {"judge": judge}, Request(ROWS, SEEDS))
    assert [len(shown) for shown in judge.shown] == [len(ROWS) * k] * 3  # after steps 2, 4 and 5
    final = judge.shown[-1].view(len(ROWS), k, -1)
    best = final.sum(-1).argmax(1)
    assert torch.equal(decoded.tokens, final[torch.arange(len(ROWS)), best].long())


def test_what_does_not_fit_is_refused(previewing: ShowO, decoder: CompactDecoder) -> None:
    with pytest.raises(ValueError, match="verified decoding needs k of at least 1, not 0"):
        Verified(SAMPLING, 0, verifier="judge")
    strategy = Verified(SAMPLING, 2, verifier="judge")
    with pytest.raises(ValueError, match="judge 'judge' does not exist here"):
        strategy.decode(previewing, {}, Request(ROWS, SEEDS))
