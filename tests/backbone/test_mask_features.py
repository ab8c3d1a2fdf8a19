"""Mask-token decoders as PARM and DPO see them: features along the way, estimates of log p."""

import pytest
import torch

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.verifier import Likelihood
from tests.helpers.asked import asked
from tests.helpers.models import FEATURES, make_masked, make_parm

SAMPLING = MaskSampling(steps=5, guidance=0.5)
PROMPTS = ["a photo of a star", "a photo of two red rings", "a photo of a cross left of a star"]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def decoder() -> MaskTokenDecoder:
    return make_masked()


def walk(decoder: MaskTokenDecoder, k: int, choice: int) -> tuple:
    """Features of the chosen candidate at each step, the proposals, and how the grids were filled."""
    state = decoder.begin(asked(PROMPTS, SEEDS), SAMPLING, k)
    features, proposals, grids, records = [], [], [], []
    taken = torch.full((3,), choice)
    while not state.is_done:
        records.append(state.statistics)
        proposals.append(decoder.propose(state, k))
        features.append(proposals[-1].features.pick(taken))
        decoder.commit(state, proposals[-1], taken)
        grids.append((state.tokens, state.unknown))
    return features, proposals, Trajectory.of(grids), records, state


def test_features_can_be_had_again_from_how_the_grid_was_filled(decoder: MaskTokenDecoder) -> None:
    features, _, trajectory, records, state = walk(decoder, k=3, choice=1)
    assert torch.equal(trajectory.previews[:, -1], state.tokens)
    for step, seen in enumerate(features):
        again = decoder.features(PROMPTS, *trajectory.at(torch.full((3,), step)), records[step])
        for name in (*FEATURES, "undecided"):
            torch.testing.assert_close(getattr(seen, name), getattr(again, name), atol=1e-5, rtol=1e-5, msg=name)
    assert not features[-1].undecided.any() and features[0].undecided.sum() > 0
    undecided = torch.stack([seen.undecided for seen in features])
    assert (undecided[1:] <= undecided[:-1]).all()  # what is decided stays so
    shown, unknown, left = trajectory.at(torch.full((3,), SAMPLING.steps))
    assert torch.equal(shown, state.tokens) and not unknown.any() and not left.any()


def test_a_token_keeps_the_log_probability_it_was_drawn_with(decoder: MaskTokenDecoder) -> None:
    features, _, trajectory, _, _ = walk(decoder, k=2, choice=0)
    final = features[-1].log_probs
    for step, seen in enumerate(features):
        now = trajectory.fixed_at == step
        assert torch.equal(final[now], seen.log_probs[now])
    total = sum((seen.log_probs * (trajectory.fixed_at == step)).sum(1) for step, seen in enumerate(features))
    torch.testing.assert_close(Likelihood().values(features[-1], [16])[:, 0], total)


def test_candidates_scored_together_equal_candidates_scored_apart(decoder: MaskTokenDecoder) -> None:
    parm = make_parm(decoder)
    _, proposals, *_ = walk(decoder, k=4, choice=2)
    for proposal in proposals:
        watch = parm.begin(proposal.features.prompt, 16)
        together = parm.score(watch, proposal.features)
        apart = [parm.score(watch, proposal.features.pick(torch.full((3,), j))) for j in range(4)]
        torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-5, rtol=1e-5)
        unfolded = proposal.features.unfold()
        torch.testing.assert_close(together.flatten(), parm.values(unfolded, [16])[:, 0], atol=1e-5, rtol=1e-5)
    assert together.std() > 1e-3


def test_features_does_not_depend_on_the_other_prompts_of_the_batch(decoder: MaskTokenDecoder) -> None:
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    together, alone = decoder.features(PROMPTS, tokens), decoder.features(PROMPTS[:1], tokens[:1])
    for name in FEATURES:
        torch.testing.assert_close(getattr(together, name)[:1], getattr(alone, name), atol=1e-5, rtol=1e-5)
    shared = decoder.features([PROMPTS[0], PROMPTS[1]], tokens[:1])
    torch.testing.assert_close(shared.select(torch.tensor([0])).hidden, alone.hidden, atol=1e-5, rtol=1e-5)


def test_plain_sampling_gives_what_parm_trains_on(decoder: MaskTokenDecoder) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    decoded = Sample(SAMPLING).decode(decoder, {}, Request(rows, SEEDS))
    features, _, trajectory, _, _ = walk(decoder, k=1, choice=0)
    assert torch.equal(decoded.trajectory.previews, trajectory.previews)
    assert torch.equal(decoded.trajectory.fixed_at, trajectory.fixed_at)
    torch.testing.assert_close(decoded.features.log_probs, features[-1].log_probs)


@pytest.mark.parametrize("stride", [1, 2])
def test_verified_decoding_of_grids_takes_the_likeliest(decoder: MaskTokenDecoder, stride: int) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    judges = {"likelihood": Likelihood(), "parm": make_parm(decoder)}
    one, best, worst = (
        Verified(SAMPLING, k=k, stride=stride, verifier="likelihood", value_weight=weight)
        for k, weight in ((1, 1.0), (6, 1.0), (6, -1.0))
    )
    plain = Sample(SAMPLING).decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(one.decode(decoder, judges, Request(rows, SEEDS)).tokens, plain.tokens)
    high, low = (strategy.decode(decoder, judges, Request(rows, SEEDS)) for strategy in (best, worst))
    assert (high.features.log_probs.sum(1) > low.features.log_probs.sum(1)).all()
    # 3 prompts and their empty twins; of two steps the second is made by each of the 6 paths
    assert high.cost.decoder_passes == {1: 5 * 6, 2: 3 * 6 + 2 * 6 * 6}[stride]
    alone = Verified(SAMPLING, k=6, stride=stride, choose="sample").decode(
        decoder, judges, Request(rows[1:2], SEEDS[1:2])
    )
    together = Verified(SAMPLING, k=6, stride=stride, choose="sample").decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(alone.tokens[0], together.tokens[1])
    assert alone.cost.verifier_calls == 6 * -(-5 // stride)


def test_kept_tokens_stay_and_the_verifier_sees_them(decoder: MaskTokenDecoder) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(1))
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.6
    for strategy in (Sample(SAMPLING), Verified(SAMPLING, k=4)):
        decoded = strategy.decode(decoder, {"parm": make_parm(decoder)}, Request(rows, SEEDS, tokens, keep))
        assert torch.equal(decoded.tokens[keep], tokens[keep])
        assert not torch.equal(decoded.tokens, tokens)


def test_a_random_order_follows_the_schedule() -> None:
    noise = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    trajectory = Trajectory.in_random_order(torch.arange(64)[None].repeat(2, 1), 8, noise)
    left = [(trajectory.fixed_at > step).sum(1).tolist() for step in range(8)]
    assert left == [[n, n] for n in (62, 59, 53, 45, 35, 24, 12, 0)]
    assert not torch.equal(trajectory.fixed_at[0], trajectory.fixed_at[1])


def test_the_estimate_is_the_bound_it_says_it_is() -> None:
    decoder = make_masked(MaskEstimate(n_masks=3))
    chosen, rejected = torch.randint(0, 32, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    first, second = decoder.pair_log_probs(PROMPTS, chosen, rejected, SEEDS)
    masks = decoder.estimate.masks(SEEDS, 16)
    assert masks.shape == (3, 3, 16) and [sorted(own) for own in masks.sum(2).T.tolist()] == masks.sum(2).T.tolist()
    for images, estimated in ((chosen, first), (rejected, second)):
        by_hand = torch.zeros(3, dtype=torch.float64)
        for mask in masks:
            logits = decoder.code_logits(images, mask, [decoder.encode_prompts(PROMPTS)]).double()
            log_p = logits.log_softmax(-1).gather(-1, images[..., None]).squeeze(-1)
            by_hand += (log_p * mask).sum(1) * 16 / mask.sum(1) / 3
        torch.testing.assert_close(estimated.double(), by_hand, atol=1e-4, rtol=1e-5)


def test_shared_masks_take_their_noise_out_of_a_pair(decoder: MaskTokenDecoder) -> None:
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    first, second = decoder.pair_log_probs(PROMPTS, tokens, tokens, SEEDS)
    torch.testing.assert_close(first, second)
    apart = [decoder.log_probs(PROMPTS, tokens, seeds) for seeds in (SEEDS, [seed + 100 for seed in SEEDS])]
    first, second = apart
    assert ((first - second).abs() > 1e-3).all()


def test_more_masks_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="n_masks=17, but an image has only 16 tokens"):
        make_masked(MaskEstimate(n_masks=17))
