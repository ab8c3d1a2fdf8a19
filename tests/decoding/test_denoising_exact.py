"""Strategies on denoising, against exact answers: on a mixture of Gaussians every value is known."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.denoising_sampling import FlowSampling
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.pruning import Pruning
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import RandomScores, Region
from lightning_modules.decoding.rollover import Rollover
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded, Strategy
from lightning_modules.decoding.verified import Verified
from tests.helpers.mixture import MIXTURE, Above, MixtureFlow, Near
from tests.helpers.toy import ToyDecoder

FLOW, PICTURES = MixtureFlow(), MixtureFlow(grid=2)
SDE, START = FlowSampling(16, solver="sde", eta=0.7), FlowSampling(8, solver="sde", eta=0.7, start=0.6)
THRESHOLD = 1.9
JUDGES = {"above": Above(THRESHOLD, 6.0), "near": Near(-2.0), "near_3": Near(3.0), "truth": Above(1.0, math.inf)}
ROW = {"prompt": "anything"}
# Half of 2 x 2 numbers are denoised again from level .6, the others are held.
REFLECTION = Reflection(Sample(SDE), Sample(START), Region(RandomScores(), quantile=0.5), 2, "near", stop_score=-0.5)


def made(strategy: Strategy, n: int, decoder: MixtureFlow = FLOW) -> Decoded:
    return strategy.decode(decoder, JUDGES, Request([ROW] * n, range(n)))


def rate(image: Decoded) -> float:
    return float((image.tokens[:, 0, 0] > THRESHOLD).float().mean())


def test_particles_with_the_exact_value_sample_the_tilted_distribution() -> None:
    """The reward is that the number is above 1, or nothing: what is left of the mixture is its part above 1."""
    n, below = 250, float(MIXTURE.cdf(torch.tensor(1.0)))
    image = made(Particles(FlowSampling(24, solver="sde", eta=0.7), n=24, stride=6, verifier="truth"), n)

    def tilted(x: np.ndarray) -> np.ndarray:
        return (MIXTURE.cdf(torch.tensor(x)).numpy() - below).clip(0) / (1 - below)

    assert kstest(image.tokens.flatten().numpy(), tilted).pvalue > 1e-3
    assert image.cost.decoder_passes == n * 24 * 24 and image.cost.verifier_calls == n * 24 * 4
    best = made(BestOfN(Sample(FlowSampling(8)), 24, "near_3"), n)  # of 24 the highest: an arg max is another law
    assert kstest(best.tokens.flatten().numpy(), tilted).pvalue < 1e-6


def test_verified_denoising_is_above_best_of_n_at_equal_passes() -> None:
    n, k = 400, 4
    plain, best = made(Sample(SDE), n), made(BestOfN(Sample(SDE), k, "above"), n)
    verified = made(Verified(SDE, k=k, verifier="above"), n)
    assert verified.cost.decoder_passes <= best.cost.decoder_passes == n * k * 16
    assert rate(plain) < 0.1 and abs(rate(best) - (1 - (1 - rate(plain)) ** k)) < 0.06
    assert rate(verified) > rate(best) + 0.25
    blocks = made(Verified(SDE, k=k, stride=4, verifier="above"), n)
    assert rate(best) + 0.1 < rate(blocks) < rate(verified) + 0.05
    assert rate(made(Beam(SDE, n=2, k=2, verifier="above"), n)) > rate(best) + 0.2


def test_a_budget_that_rolls_over_is_above_the_same_number_of_candidates_at_every_step() -> None:
    n, k = 400, 4
    rolling = made(Rollover(SDE, k=k, verifier="above"), n)
    drawn = rolling.stats["candidates"]
    # A pass for each candidate but those of the last step, and the first.
    assert rolling.cost.decoder_passes == n + int(drawn.sum()) - n and rolling.cost.verifier_calls == int(drawn.sum())
    assert drawn.max() <= 16 * k and 1.5 * 16 < drawn.mean() < 0.9 * 16 * k
    verified = made(Verified(SDE, k=round(float(drawn.mean()) / 16), verifier="above"), n)
    assert (
        rate(rolling) > rate(verified) - 0.05 and rate(rolling) > rate(made(BestOfN(Sample(SDE), k, "above"), n)) + 0.2
    )
    assert torch.equal(made(Rollover(SDE, k=1, verifier="above"), 20).tokens, made(Sample(SDE), 20).tokens)
    with pytest.raises(ValueError, match="all candidates of a ToyDecoder come from one pass"):
        Rollover(None, k=2, verifier="above").check_decoder(ToyDecoder())


def test_pruned_paths_cost_no_further_pass() -> None:
    whole = made(Pruning(SDE, n=4, share=0.0, stride=4, verifier="above"), 60)
    pruned = made(Pruning(SDE, n=4, share=0.9, stride=4, verifier="above"), 60)
    assert torch.equal(whole.tokens, made(BestOfN(Sample(SDE), 4, "above"), 60).tokens)
    kept = [int(choice.kept.sum()) for choice in pruned.trace[:-1]]
    # The value after step 4 i is of a pass at the latents of step 4 i + 1, whoever makes it.
    assert pruned.cost.decoder_passes == 5 * 240 + sum(4 * each for each in kept[:2]) + 3 * kept[2]
    assert pruned.cost.decoder_passes < 0.7 * whole.cost.decoder_passes


@pytest.mark.parametrize(
    "strategy",
    [
        Sample(FlowSampling(4)),
        Verified(SDE, k=2, verifier="near"),
        Verified(SDE, k=2, stride=5, verifier="near"),
        Verified(SDE, k=3, verifier="above", choose="sample", random_stop=True),
        Rollover(SDE, k=3, verifier="near"),
        Beam(SDE, n=2, k=2, verifier="near"),
        Particles(SDE, n=3, stride=4, verifier="near"),
        Pruning(SDE, n=3, share=0.5, stride=4, verifier="near"),
        Potential(SDE, 3, "near", stride=4),
        BestOfN(Sample(SDE), 3, "near"),
        REFLECTION,
        Reflection(Sample(SDE), Sample(SDE), Region(RandomScores(), threshold=1.0), 2, "near", stop_score=-0.5),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_every_strategy_denoises_each_image_as_if_it_were_alone(strategy: Strategy) -> None:
    together = made(strategy, 6, PICTURES)
    apart = [strategy.decode(PICTURES, JUDGES, Request([ROW], [seed])) for seed in range(6)]
    assert together.tokens.shape == (6, 4, 1) and torch.equal(together.tokens, torch.cat([one.tokens for one in apart]))
    assert together.cost.decoder_passes == sum(one.cost.decoder_passes for one in apart)


def test_reflection_holds_what_is_satisfactory() -> None:
    plain, image = made(Sample(SDE), 40, PICTURES), made(REFLECTION, 40, PICTURES)
    again = (image.tokens != plain.tokens)[..., 0]
    assert 0 < int(again.any(1).sum()) < 40  # some were satisfactory, and some got worse
    assert int(again.sum(1).max()) <= 4 and (again.sum(1) == 2).any()
    judge = JUDGES["near"]
    better = judge.of_finished([], None, lambda: PICTURES.image_tokenizer.decode(image.tokens))
    assert (better >= judge.of_finished([], None, lambda: PICTURES.image_tokenizer.decode(plain.tokens))).all()


def test_strategies_refuse_candidates_that_would_be_equal() -> None:
    for strategy in (Verified(FlowSampling(4), k=2, verifier="near"), Beam(FlowSampling(4), n=1, k=2, verifier="near")):
        with pytest.raises(ValueError, match=r"sampling\.eta=0 adds no noise"):
            strategy.check_decoder(FLOW)
    Verified(SDE, k=2, verifier="near").check_decoder(FLOW)
