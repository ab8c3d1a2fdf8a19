"""Reflection: where it looks, what it changes, what it keeps, when it stops."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.features import STATISTICS
from lightning_modules.backbone.image_tokenizer import upsample_patches
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling, image_seed
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import (
    PatchCLIPScore,
    RandomScores,
    Region,
    TokenConfidence,
    TokenScorer,
    ValueGain,
)
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Critic, Likelihood, Reward
from tests.helpers.models import make_masked, make_parm, make_showo

SAMPLING = Sampling(guidance=0.5)
SEEDS = [image_seed(1, i) for i in range(12)]
PLAIN = Sample(SAMPLING)
QUARTER = Region(RandomScores(), quantile=0.25)


class Darkness(Reward):
    """Likes dark images."""

    def cache_key(self):
        return type(self).__name__

    def __call__(self, prompts, pixels):
        return -pixels.mean((1, 2, 3))


class Given(TokenScorer):
    """Scores that the test gives, by the prompt."""

    judge_names = ()

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def __call__(self, decoder, judges, request, image):
        return torch.stack([self.scores[prompt] for prompt in request.prompts])


@pytest.fixture
def judges(parm: PARM) -> dict:
    return {"parm": parm, "likelihood": Likelihood(), "darkness": Darkness()}


@pytest.fixture
def image(decoder: CompactDecoder, rows: list) -> Decoded:
    return PLAIN.decode(decoder, {}, Request(rows, SEEDS))


def replay(decoded: Decoded) -> Tensor:
    """The images that the trace says there were in the end, [B, T]."""
    tokens = decoded.tokens.clone()
    for step in decoded.trace[::-1]:
        tokens[step.rows] = step.before
    for step in decoded.trace:
        assert torch.equal(tokens[step.rows], step.before)
        assert torch.equal(step.after[~step.region_mask], step.before[~step.region_mask])
        tokens[step.rows[step.accepted]] = step.after[step.accepted]
    return tokens


@pytest.mark.parametrize(
    "again",
    [
        PLAIN,
        Verified(SAMPLING, k=3),
        Verified(SAMPLING, k=2, stride=4),
        BestOfN(PLAIN, 2, "parm"),
        Particles(SAMPLING, 2),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
@pytest.mark.parametrize(
    "where",
    [
        QUARTER,
        Region(ValueGain(), quantile=0.25, patches=2),
        Region(ValueGain(), threshold=-0.02, rewind=True),
        Region(TokenConfidence(), threshold=-2.0),
    ],
    ids=lambda region: type(region.scorer).__name__,
)
def test_only_omega_changes_and_the_score_never_falls(
    decoder: CompactDecoder, rows: list, judges: dict, image: Decoded, again, where: Region
) -> None:
    decoded = Reflection(PLAIN, again, where, rounds=3).decode(decoder, judges, Request(rows, SEEDS))
    assert decoded.trace
    assert torch.equal(replay(decoded), decoded.tokens)
    values = [judges["parm"].values(i.features, [16])[:, 0] for i in (image, decoded)]
    assert (values[1] >= values[0]).all()
    full = decoder.features([row["prompt"] for row in rows], decoded.tokens)
    torch.testing.assert_close(decoded.features.log_probs, full.log_probs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "again",
    [BestOfN(Verified(SAMPLING, k=3, choose="sample"), 2, "parm"), Verified(SAMPLING, 2, 4), Particles(SAMPLING, 3, 4)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_images_do_not_depend_on_the_batch(decoder: CompactDecoder, rows: list, judges: dict, again) -> None:
    strategy = Reflection(PLAIN, again, Region(ValueGain(), threshold=-0.02, rewind=True), rounds=3)
    rows, seeds = rows[::2], SEEDS[::2]  # one of each task
    together = strategy.decode(decoder, judges, Request(rows, seeds))
    apart = [strategy.decode(decoder, judges, Request([r], [s])).tokens for r, s in zip(rows, seeds, strict=True)]
    assert torch.equal(together.tokens, torch.cat(apart))
    assert len({int(step.region_mask.sum()) for step in together.trace}) > 1


def test_accepting_always_is_the_letter(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    decoded = Reflection(PLAIN, PLAIN, QUARTER, rounds=2, accept="always").decode(decoder, judges, Request(rows, SEEDS))
    assert all(step.accepted.all() for step in decoded.trace)
    assert torch.equal(decoded.tokens, decoded.trace[-1].after)
    assert (decoded.trace[0].scores.diff(dim=1) < 0).any()


def test_each_image_stops_on_its_own(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    """Satisfactory images are left alone; those that hardly change are done."""
    two = [rows[0], rows[6]]
    scores = {rows[0]["prompt"]: torch.ones(16), rows[6]["prompt"]: torch.ones(16)}
    scores[rows[6]["prompt"]][5:7] = 0
    seen = Region(Given(scores), threshold=0.5)
    decoded = Reflection(PLAIN, PLAIN, seen, rounds=4).decode(decoder, judges, Request(two, SEEDS[:2]))
    assert [step.rows.tolist() for step in decoded.trace] == [[1]] * 4
    assert all(step.region_mask.nonzero()[:, 1].tolist() == [5, 6] for step in decoded.trace)
    nothing = Region(Given(scores), threshold=-1.0)
    assert not Reflection(PLAIN, PLAIN, nothing, rounds=4).decode(decoder, judges, Request(two, SEEDS[:2])).trace
    still = Reflection(PLAIN, PLAIN, seen, rounds=4, epsilon=1e9).decode(decoder, judges, Request(two, SEEDS[:2]))
    assert len(still.trace) == 1
    pleased = Reflection(PLAIN, PLAIN, seen, rounds=4, stop_score=-1e9).decode(decoder, judges, Request(two, SEEDS[:2]))
    assert not pleased.trace


def test_a_round_costs_its_share(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    plain = PLAIN.decode(decoder, judges, Request(rows, SEEDS)).cost
    for share in (0.25, 0.5):
        where = Region(RandomScores(), quantile=share)
        cost = Reflection(PLAIN, PLAIN, where, rounds=2).decode(decoder, judges, Request(rows, SEEDS)).cost
        extra = (cost.decoder_passes - plain.decoder_passes) / (2 * 2 * len(rows))
        assert 16 * share <= extra <= 16 * share + 1
        assert cost.verifier_calls == 3 * len(rows)


def test_regions(decoder: CompactDecoder, rows: list, image: Decoded) -> None:
    scores = torch.arange(16.0).roll(5)
    one, only = [rows[0]], image.select(torch.tensor([0]))
    look = Given({rows[0]["prompt"]: scores})

    def found(**settings: Any) -> list[int]:
        return Region(look, **settings)(decoder, {}, Request(one, SEEDS[:1]), only)[0].nonzero().squeeze(1).tolist()

    assert found(threshold=2.0) == found(quantile=0.125) == [5, 6]
    assert found(threshold=2.0, rewind=True) == list(range(5, 16))
    assert found(quantile=0.25, patches=2) == [8, 9, 12, 13]  # of the means 9.5, 7.5, 5.5, 7.5
    assert torch.equal(
        upsample_patches(torch.tensor([[[0, 1], [2, 3]]]), 4).view(4, 4)[1:3, 1:3], torch.tensor([[0, 1], [2, 3]])
    )
    for settings in ({}, {"threshold": 0.0, "quantile": 0.5}):
        with pytest.raises(ValueError, match="either a threshold or a quantile"):
            Region(look, **settings)
    with pytest.raises(ValueError, match="must lie between 0 and 1, not 1"):
        Region(look, quantile=1)
    with pytest.raises(ValueError, match="4x4 tokens cannot be cut into 3x3 patches"):
        found(quantile=0.5, patches=3)


def test_mask_token_decoders_are_least_confident_of_what_does_not_fit() -> None:
    decoder = make_showo()
    prompts = [{"prompt": "1 2 3"}, {"prompt": "4"}]
    decoder.image_tokenizer.grid = 4
    image = Sample(MaskSampling(steps=3)).decode(decoder, {}, Request(prompts, [0, 1]))
    decoder.image_tokenizer.decode = lambda tokens: tokens.float()[:, None, None].expand(-1, 3, 1, -1)
    seen = TokenConfidence()(decoder, {}, Request(prompts, [0, 1]), image)
    assert seen.shape == image.tokens.shape and (seen < 0).all()
    plain = Sample(MaskSampling(steps=3))
    where = Region(TokenConfidence(), quantile=0.25)
    decoded = Reflection(plain, plain, where, rounds=2, judge="darkness").decode(
        decoder, {"darkness": Darkness()}, Request(prompts, [0, 1])
    )
    assert torch.equal(replay(decoded), decoded.tokens)
    assert (decoded.trace[0].region_mask.sum(1) == 4).all()
    with pytest.raises(ValueError, match="verification needs features"):
        ValueGain("likelihood")(decoder, {"likelihood": Likelihood()}, Request(prompts, [0, 1]), image)


def test_of_a_grid_each_patch_gained_what_its_absence_costs(rows: list) -> None:
    decoder = make_masked()
    parm, plain = make_parm(decoder), Sample(MaskSampling(steps=3, guidance=0.5))
    image = plain.decode(decoder, {}, Request(rows, SEEDS))
    before = image.cost.decoder_passes
    gain = ValueGain(patches=2)(decoder, {"parm": parm}, Request(rows, SEEDS), image)
    assert image.cost.decoder_passes - before == 2 * 4 * len(rows)
    assert gain.flatten(1).unique(dim=1).shape[1] == 4  # all tokens of a patch share its score
    for row, corner in ((0, (0, 0)), (5, (2, 0)), (7, (2, 2))):
        absent = torch.zeros(1, 4, 4, dtype=torch.bool)
        absent[:, corner[0] : corner[0] + 2, corner[1] : corner[1] + 2] = True
        absent = absent.flatten(1)
        own = image.select(torch.tensor([row]))
        decided = torch.stack([own.features.log_probs, own.features.unconditional_log_probs, own.features.entropy])
        without = decoder.features([rows[row]["prompt"]], own.tokens, absent, absent, decided)
        lost = parm.values(own.features, [16]).exp() - parm.values(without, [16]).exp()
        torch.testing.assert_close(gain[row][absent[0]], lost[0].expand(4), atol=1e-5, rtol=1e-4)


class Complaint(Critic):
    """Finds every image too bright."""

    def cache_key(self):
        return type(self).__name__

    def __call__(self, prompts, pixels):
        return -pixels.mean((1, 2, 3))

    def critique(self, prompts: Sequence[str], pixels: Tensor) -> list[str]:
        return ["black"] * len(pixels)


@pytest.mark.parametrize("steps", [3, 6, 8])
def test_parm_can_learn_from_grids_as_reflection_judged_them(rows: list, steps: int) -> None:
    decoder = make_masked()
    judges = {"parm": make_parm(decoder)}
    where = Region(TokenConfidence(), quantile=0.5)
    reflection = Reflection(Sample(MaskSampling(6, 0.5)), Sample(MaskSampling(steps, 0.5)), where, rounds=2)
    image = reflection.decode(decoder, judges, Request(rows, SEEDS))
    assert image.stats["accepted_rounds"].any() and not image.stats["accepted_rounds"].all()
    assert image.trajectory is not None and (image.first_unverified == 5).all()  # all but the finished image was chosen
    decided = torch.stack([getattr(image.features, name) for name in STATISTICS])
    seen = decoder.features(
        [row["prompt"] for row in rows], *image.trajectory.at(image.first_unverified.long()), decided
    )
    values = [judges["parm"].values(features, [decoder.num_tokens]) for features in (seen, image.features)]
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    assert values[0].std() > 1e-4


def test_what_reflection_has_chosen_is_not_what_the_decoder_draws(
    decoder: CompactDecoder, rows: list, judges: dict
) -> None:
    plain = PLAIN.decode(decoder, judges, Request(rows, SEEDS))
    satisfied = judges["parm"].values(plain.features, [decoder.num_tokens]).median().item()
    image = Reflection(PLAIN, PLAIN, QUARTER, rounds=1, stop_score=satisfied).decode(
        decoder, judges, Request(rows, SEEDS)
    )
    assert 0 < image.stats["rounds"].sum() < len(rows)
    assert image.first_unverified.tolist() == [decoder.num_tokens * int(r) for r in image.stats["rounds"]]


def test_the_prompt_of_a_round_carries_what_was_wrong(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    judges["critic"] = Complaint()
    told = Reflection(PLAIN, PLAIN, QUARTER, 1, "critic", accept="always", critique_template="{prompt} {critique}")
    decoded = told.decode(decoder, judges, Request(rows[:2], SEEDS[:2]))
    prompts = [{"prompt": row["prompt"] + " black"} for row in rows[:2]]
    step = decoded.trace[0]
    drawn = [image_seed(seed, 0, 0) for seed in SEEDS[:2]]
    assert torch.equal(
        PLAIN.decode(decoder, {}, Request(prompts, drawn, step.before, ~step.region_mask)).tokens, decoded.tokens
    )
    with pytest.raises(ValueError, match="judge 'darkness' cannot say what is wrong"):
        Reflection(PLAIN, PLAIN, QUARTER, 1, "darkness", critique_template="{critique}").decode(
            decoder, judges, Request(rows, SEEDS)
        )


def test_impossible_settings_are_refused(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    with pytest.raises(ValueError, match="at least 1 round, not 0"):
        Reflection(PLAIN, PLAIN, QUARTER, 0)
    with pytest.raises(ValueError, match="accept must be 'better' or 'always', not 'never'"):
        Reflection(PLAIN, PLAIN, QUARTER, 1, accept="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stop_score=0\.95 is never reached: 'parm' gives log-values"):
        Reflection(PLAIN, PLAIN, QUARTER, 1, stop_score=0.95).decode(decoder, judges, Request(rows, SEEDS))
    with pytest.raises(ValueError, match="judge 'clip' does not score patches; there are: none"):
        Reflection(PLAIN, PLAIN, Region(PatchCLIPScore(2), quantile=0.5), 1).decode(
            decoder, judges, Request(rows, SEEDS)
        )
    with pytest.raises(ValueError, match="judge 'darkness' values no prefixes; there are: parm, likelihood"):
        Reflection(PLAIN, PLAIN, Region(ValueGain("darkness"), 0.5), 1).decode(decoder, judges, Request(rows, SEEDS))
    with pytest.raises(ValueError, match="Darkness does not score patches"):
        judges["darkness"].patches([], torch.zeros(0, 3, 4, 4), 2)
    with pytest.raises(ValueError, match="judge 'geneval' does not exist here"):
        Reflection(PLAIN, PLAIN, QUARTER, 1, "geneval").decode(decoder, judges, Request(rows, SEEDS))


def test_decoders_that_settings_do_not_fit_are_refused_by_the_key(decoder: CompactDecoder) -> None:
    halves = Region(TokenConfidence(), quantile=0.25, patches=2)
    Reflection(PLAIN, PLAIN, halves, 1).check_decoder(decoder)
    thirds = Region(TokenConfidence(), quantile=0.25, patches=3)
    with pytest.raises(ValueError, match=r"^region_selector\.patches=3 does not divide the 4x4 tokens of an image$"):
        Reflection(PLAIN, PLAIN, thirds, 1).check_decoder(decoder)
    filled = Reflection(PLAIN, Sample(MaskSampling(8)), halves, 1)
    said = "sampling is a MaskSampling, and a CompactDecoder takes a Sampling$"
    with pytest.raises(ValueError, match=rf"^redecoder\.{said}"):
        filled.check_decoder(decoder)
    with pytest.raises(ValueError, match=rf"^strategy\.redecoder\.{said}"):
        BestOfN(filled, 2, "parm").check_decoder(decoder)


def test_a_reflection_on_a_reflection_goes_on_where_that_ended(
    decoder: CompactDecoder, judges: dict, rows: list
) -> None:
    def reflect(strategy, rounds: int) -> Decoded:
        again = Reflection(strategy, PLAIN, Region(RandomScores(), threshold=1.0), rounds)
        return again.decode(decoder, judges, Request(rows, SEEDS))

    twice = reflect(Reflection(PLAIN, PLAIN, Region(RandomScores(), threshold=1.0), 2), 3)
    assert torch.equal(twice.tokens, reflect(PLAIN, 5).tokens)
    assert len({tuple(event.after.flatten().tolist()) for event in twice.trace}) == 5
