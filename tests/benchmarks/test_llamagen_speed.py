"""LlamaGen's sampler against a straightforward one on the same weights: pytest tests/benchmarks --benchmark-only -n 0

Both decode a whole image, 256 tokens, on one thread; what a processor spent is compared. Pixels are left out.
"""

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lightning_modules.backbone.sampling import Sampling
from tests.helpers.measuring import measured
from tests.helpers.peers import PROMPT, decode, random_llamagen, straightforward_llamagen, with_plain_linear

SAMPLING = Sampling(top_k=1000, guidance=6.5)


def test_sampling_against_a_straightforward_version(benchmark: BenchmarkFixture) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoder, greedy = random_llamagen(), Sampling(1e-4, guidance=6.5)
        plain = with_plain_linear(decoder)
        expected = straightforward_llamagen(plain, PROMPT, greedy, 48)
        assert torch.equal(decode(decoder, [PROMPT], greedy, 48)[:, :48], expected)
        assert len(expected.unique()) > 24
        slow = measured(lambda: straightforward_llamagen(plain, PROMPT, SAMPLING, decoder.num_tokens))
        fast = benchmark.pedantic(measured, (lambda: decode(decoder, [PROMPT], SAMPLING),), rounds=1, warmup_rounds=0)
    finally:
        torch.set_num_threads(threads)
    ratio = slow.seconds / fast.seconds
    benchmark.extra_info |= {"times_faster": ratio, "fast": fast._asdict(), "slow": slow._asdict()}
    print(
        f"\n{fast.seconds:.1f} s an image, {ratio:.2f} x as fast as the straightforward {slow.seconds:.1f} s; "
        f"peak {fast.mebibytes:.0f} against {slow.mebibytes:.0f} MiB"
    )
    assert ratio >= 1.5
