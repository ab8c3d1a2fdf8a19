"""Search against exact answers: on a decoder of 81 images every probability can be enumerated."""

from collections.abc import Sequence

import pytest
import torch
from scipy.stats import binom, chi2
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.pruning import Pruning
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import RandomScores, Region, TokenConfidence
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Strategy
from lightning_modules.decoding.verified import Verified
from tests.helpers.toy import CODES, IMAGES, TOKENS, Glance, Greedy, ToyDecoder, Truth

N = 3000
ROWS = [{"prompt": "anything"}]
DECODER = ToyDecoder()
TRUTH = Truth(DECODER)
JUDGES = {"truth": TRUTH, "glance": Glance()}


def made(strategy: Strategy, n: int = N) -> Tensor:
    """n images, [n, T]."""
    return strategy.decode(DECODER, JUDGES, Request(ROWS * n, range(n))).tokens


def assert_rate(images: Tensor, expected: float) -> None:
    """The rate of success is the expected one: within a two-sided binomial bound of one in 10,000."""
    right = int((images.sum(1) % 3 == 0).sum())
    low, high = binom.interval(1 - 1e-4, len(images), expected)
    assert low <= right <= high, f"{right / len(images):.4f} instead of {expected:.4f}"


def assert_distribution(images: Tensor, probs: Tensor) -> None:
    """The images are draws from `probs` [81]: chi-square test at one in 10,000."""
    index = (images * CODES ** torch.arange(TOKENS - 1, -1, -1)).sum(1)
    seen = torch.bincount(index, minlength=len(IMAGES)).double()
    assert not seen[probs == 0].any()
    expected = len(images) * probs.double()
    rare = expected < 5  # are counted together
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    seen, expected = (x[:-1] if expected[-1] < 5 else x for x in (seen, expected))
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert statistic < chi2.ppf(1 - 1e-4, len(seen) - 1), statistic


def after_best_of(k: int, prefix: Sequence[int] = ()) -> float:
    """P(success) when at every step the candidate of the highest exact value is taken, of k independent ones."""
    if len(prefix) == TOKENS:
        return float(sum(prefix) % 3 == 0)
    log_p = DECODER.table[len(prefix), prefix[-1] if prefix else 0]
    values = TRUTH.chance(torch.tensor([[*prefix, code] for code in range(CODES)]))
    total = 0.0
    for code in range(CODES):  # taken if no better one is drawn, and it is
        worse = float(log_p.exp()[values < values[code]].sum())
        taken = (worse + float(log_p.exp()[code])) ** k - worse**k
        total += taken * after_best_of(k, [*prefix, code])
    return total


def test_plain_sampling_draws_from_the_decoder() -> None:
    assert 0.2 < TRUTH.success < 0.5
    assert_distribution(made(Sample(None)), TRUTH.probs)


@pytest.mark.parametrize("n", [2, 5])
def test_best_of_n_reaches_its_order_statistic(n: int) -> None:
    assert_rate(made(BestOfN(Sample(None), n, "truth")), 1 - (1 - TRUTH.success) ** n)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_verified_decoding_by_the_exact_value_reaches_the_enumerated_rate(k: int) -> None:
    assert_rate(made(Verified(None, k=k, verifier="truth")), after_best_of(k))


def test_verified_decoding_that_draws_by_value_samples_the_posterior() -> None:
    posterior = TRUTH.probs * TRUTH.right / TRUTH.success
    assert_distribution(made(Verified(None, k=128, verifier="truth", choose="sample"), 1500), posterior)


def test_particles_sample_the_posterior() -> None:
    posterior = TRUTH.probs * TRUTH.right / TRUTH.success
    assert_distribution(made(Particles(None, n=128, stride=1, verifier="truth"), 1500), posterior)


def test_nothing_is_pruned_without_reason() -> None:
    """Paths that cannot succeed stop, so of n images one succeeds as often as in best-of-n."""
    pruned = made(Pruning(None, n=4, share=0.0, stride=1, verifier="truth"))
    assert torch.equal(pruned, made(BestOfN(Sample(None), 4, "truth")))
    assert_rate(made(Pruning(None, n=4, share=1e-9, stride=1, verifier="truth")), 1 - (1 - TRUTH.success) ** 4)


def test_a_beam_as_wide_as_the_world_finds_an_image_that_is_right() -> None:
    assert (made(Beam(None, n=27, k=32, verifier="truth"), 200).sum(1) % 3 == 0).all()


def test_decoding_again_while_the_truth_is_not_satisfied_is_best_of_n() -> None:
    again = Reflection(Sample(None), Sample(None), Region(RandomScores(), threshold=1.0), 2, "truth", stop_score=-0.1)
    assert_rate(made(again), 1 - (1 - TRUTH.success) ** 3)


@pytest.mark.parametrize(
    "strategy",
    [
        Greedy(3),
        Verified(None, k=2, stride=2, verifier="truth"),
        Verified(None, k=2, verifier="glance"),
        BestOfN(Verified(None, k=2, verifier="truth"), 2, "glance"),
        Potential(None, 3, "glance"),
        Reflection(Sample(None), Greedy(2), Region(TokenConfidence(), quantile=0.5), 2, "glance"),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_every_strategy_decodes_each_image_as_if_it_were_alone(strategy: Strategy) -> None:
    together = made(strategy, 12)
    apart = [strategy.decode(DECODER, JUDGES, Request(ROWS, [seed])).tokens for seed in range(12)]
    assert together.shape == (12, TOKENS) and torch.equal(together, torch.cat(apart))
