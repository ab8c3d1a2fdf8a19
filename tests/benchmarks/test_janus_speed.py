"""Janus's sampler against transformers' own on the same weights: pytest tests/benchmarks --benchmark-only -n 0

Both decode whole images, 576 tokens, on one thread; what a processor spent is compared. Pixels are left out.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lightning_modules.backbone.janus import Janus
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.verifier import Likelihood
from tests.helpers.asked import asked
from tests.helpers.measuring import Measured, measured
from tests.helpers.peers import DEPTH, PROMPT, decode, janus_pair, theirs_decode

SAMPLING = Sampling(guidance=4.0)
FEW = 48  # tokens by which settings of transformers are compared; its steps cost the same from first to last


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Janus, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield janus_pair(feature_layers=[DEPTH])
    torch.set_num_threads(threads)


def timed(benchmark: BenchmarkFixture, function: Callable[[], object]) -> Measured:
    found: Measured = benchmark.pedantic(measured, (function,), rounds=1, warmup_rounds=0)
    return found


@pytest.mark.parametrize(("images", "least"), [(1, 1.5), (8, 2.0)])
def test_sampling_against_transformers(
    benchmark: BenchmarkFixture, pair: tuple[Janus, Any], images: int, least: float
) -> None:
    ours, theirs = pair
    ours.feature_layers = ()
    ids = torch.tensor(ours.text_tokenizer.encode([PROMPT]))
    expected = theirs_decode(theirs, ids, 1, FEW, sample=False)
    assert torch.equal(decode(ours, [PROMPT], Sampling(1e-4, guidance=4.0), FEW)[:, :FEW], expected)
    assert len(expected.unique()) > FEW // 2

    def slow_seconds(batch: int) -> float:
        return measured(lambda: theirs_decode(theirs, ids, batch, FEW)).seconds / batch

    batch = min([size for size in (1, 2, 4, 8) if size <= images], key=slow_seconds)
    slow = measured(lambda: theirs_decode(theirs, ids, batch, ours.num_tokens))
    fast = timed(benchmark, lambda: decode(ours, [PROMPT] * images, SAMPLING))
    slow = slow._replace(seconds=slow.seconds * images / batch)
    ratio = slow.seconds / fast.seconds
    benchmark.extra_info |= {"times_faster": ratio, "fast": fast._asdict(), "slow": slow._asdict(), "batch": batch}
    print(
        f"\n{images} images of a prompt: {fast.seconds:.1f} s, {ratio:.2f} x as fast as transformers ({batch} at once,"
        f" {slow.seconds:.1f} s); peak {fast.mebibytes:.0f} against {slow.mebibytes:.0f} MiB"
    )
    assert ratio >= least


def test_verified_decoding_costs_at_most_half_more_than_plain_sampling(
    benchmark: BenchmarkFixture, pair: tuple[Janus, Any]
) -> None:
    """By the decoder's own likelihood, so the features of 8 candidates count; plain sampling makes none."""
    decoder, request = pair[0], asked([PROMPT])
    decoder.feature_layers = ()
    plain = measured(lambda: Sample(SAMPLING).decode(decoder, {}, request))
    decoder.feature_layers = (DEPTH,)
    strategy, judges = Verified(SAMPLING, k=8, verifier="likelihood"), {"likelihood": Likelihood()}
    verified = timed(benchmark, lambda: strategy.decode(decoder, judges, request))
    ratio = verified.seconds / plain.seconds
    benchmark.extra_info |= {"times_plain": ratio, "plain": plain._asdict(), "verified": verified._asdict()}
    print(
        f"\nverified k=8: {ratio:.2f} x plain sampling ({plain.seconds:.1f} s); "
        f"peak {verified.mebibytes:.0f} and {plain.mebibytes:.0f} MiB"
    )
    assert ratio <= 1.5
