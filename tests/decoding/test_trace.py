"""The trace: what was kept leads to the image, and it tells of each image what it tells of it alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.sampling import Sampling, image_seed
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.pruning import Pruning
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import Region, ValueGain
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded
from lightning_modules.decoding.trace import Choice, ReflectionRound
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import StepJudge
from tests.helpers.models import make_masked, make_parm

SAMPLING = Sampling(guidance=0.5)
PLAIN = Sample(SAMPLING)
SEEDS = [image_seed(1, i) for i in range(12)]
STRATEGIES = [
    Verified(SAMPLING, k=3),
    Verified(SAMPLING, k=3, stride=5, choose="sample"),
    BestOfN(PLAIN, 3, "parm"),
    BestOfN(Verified(SAMPLING, k=3, choose="sample"), 2, "parm"),
    Particles(SAMPLING, 3, stride=5),
    Beam(SAMPLING, n=3, k=2),
    Pruning(SAMPLING, 3, share=0.9, stride=5),
]
REFLECTION = Reflection(BestOfN(PLAIN, 2, "parm"), PLAIN, Region(ValueGain(), threshold=-0.02, rewind=True), rounds=2)


def check(choice: Choice, image: Decoded) -> None:
    """One of the candidates that went on is the image, as far as it was made; what does not exist does not go on."""
    assert choice.tokens.shape[:2] == choice.scores.shape == choice.kept.shape
    assert not choice.kept[choice.scores.isnan()].any()
    length = image.tokens.shape[1]
    decided = torch.full((len(image.tokens),), length) if choice.decided is None else choice.decided
    made = torch.arange(length) < decided[:, None]
    if choice.tokens.shape[2] == 1:
        made &= torch.arange(length) == decided[:, None] - 1
    same = ((choice.tokens == image.tokens[:, None]) | ~made[:, None]).all(2)
    assert (same & (choice.kept > 0)).any(1).all()


def went_on(choice: Choice) -> Counter[tuple[int, ...]]:
    """How often each candidate of the first image went on; which of two equal ones did is chance."""
    kept: Counter[tuple[int, ...]] = Counter()
    for tokens, times in zip(choice.tokens[0].tolist(), choice.kept[0].tolist(), strict=True):
        kept[tuple(tokens)] += times
    return kept


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_what_was_kept_leads_to_the_image(decoder: CompactDecoder, parm: PARM, rows: list, strategy) -> None:
    image = strategy.decode(decoder, {"parm": parm}, Request(rows, SEEDS))
    for choice in image.trace:
        check(choice, image)
    final = image.trace[-1]
    won = final.scores.masked_fill(final.kept == 0, -torch.inf).amax(1)
    torch.testing.assert_close(won, parm.values(image.features, [16])[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", [*STRATEGIES, REFLECTION], ids=lambda strategy: type(strategy).__name__)
def test_the_trace_does_not_depend_on_the_batch(decoder: CompactDecoder, parm: PARM, rows: list, strategy) -> None:
    """An image that is decoded again by itself tells the same as its rows of the batch's trace."""
    together = strategy.decode(decoder, {"parm": parm}, Request(rows, SEEDS))
    for i in (7, 2):
        alone = strategy.decode(decoder, {"parm": parm}, Request(rows[i : i + 1], SEEDS[i : i + 1]))
        own = together.select(torch.tensor([i]))
        assert torch.equal(own.tokens, alone.tokens)
        events = [event for event in own.trace if isinstance(event, Choice) or len(event.rows)]
        assert len(events) == len(alone.trace)
        for event, other in zip(events, alone.trace, strict=True):
            for name in ("tokens", "decided", "rows", "region_mask", "before", "after", "accepted"):
                if getattr(event, name, None) is not None:
                    assert torch.equal(getattr(event, name), getattr(other, name)), name
            if isinstance(event, Choice):
                assert went_on(event) == went_on(other)
            torch.testing.assert_close(event.scores, other.scores, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_reflection_follows_on_what_it_wraps(decoder: CompactDecoder, parm: PARM, rows: list) -> None:
    image = REFLECTION.decode(decoder, {"parm": parm}, Request(rows, SEEDS))
    best, *rounds = image.trace
    assert isinstance(best, Choice) and rounds and all(isinstance(event, ReflectionRound) for event in rounds)
    swapped = image.select(torch.tensor([5, 0]))
    for event, own in zip(rounds, swapped.trace[1:], strict=True):
        assert own.rows.tolist() == [new for new, old in enumerate((5, 0)) if old in event.rows.tolist()]
        for new, after in zip(own.rows.tolist(), own.after, strict=True):
            assert torch.equal(after, event.after[event.rows == (5, 0)[new]][0])


class Mean(StepJudge):
    """Sees everything at once and likes light images."""

    def cache_key(self):
        return type(self).__name__

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        light = pixels.mean((1, 2, 3))
        return torch.ones(len(pixels)), (light > light.mean()).float()

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3))


@pytest.fixture(scope="module")
def masked() -> MaskTokenDecoder:
    return make_masked()


def test_candidates_of_mask_token_decoders_are_previews(masked: MaskTokenDecoder, rows: list) -> None:
    sampling = MaskSampling(steps=5, guidance=0.5)
    judges = {"parm": make_parm(masked), "judge": Mean()}
    for strategy in (Verified(sampling, k=3), Verified(sampling, 3, verifier="judge")):
        image = strategy.decode(masked, judges, Request(rows[:3], SEEDS[:3]))
        assert len(image.trace) == sampling.steps and image.trajectory is not None
        for choice, preview in zip(image.trace, image.trajectory.previews.unbind(1), strict=True):
            taken = choice.tokens[torch.arange(3), choice.kept.argmax(1)]
            assert torch.equal(taken, preview) and choice.decided is None
    pruned = Potential(sampling, 3, "judge").decode(masked, judges, Request(rows[:3], SEEDS[:3]))
    verdict, final = pruned.trace
    assert torch.equal(verdict.kept.bool(), verdict.scores > 0.5)  # all were clear at once
    check(final, pruned)
