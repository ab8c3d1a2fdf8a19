"""Show-o's sampler against a straightforward one on the same weights: pytest tests/benchmarks --benchmark-only -n 0"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.decoding.potential import Potential
from lightning_modules.rewards.verifier import StepJudge
from tests.helpers.measuring import peak_mebibytes, seconds
from tests.helpers.straightforward import PROMPTS, SAMPLING, build, ours, straightforward


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("text", "codes", "least"), [(4096, 1024, 1.7), (50295, 8192, 3.5)], ids=["small vocabulary", "real vocabulary"]
)
def test_sampling_against_a_straightforward_version(
    benchmark: BenchmarkFixture, text: int, codes: int, least: float, batch: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoder, prompts = build(text, codes), PROMPTS[:batch]
        slow = lambda: torch.cat([straightforward(decoder, prompt, i) for i, prompt in enumerate(prompts)])  # noqa: E731
        if batch == 1:  # in double precision; in single rounding decides a token now and then, and all drawn after it
            assert torch.equal(ours(decoder.double(), prompts), straightforward(decoder, prompts[0], 0))
            decoder.float()
        slow_one = partial(straightforward, decoder, prompts[0], 0)
        slow_times: list[float] = []  # one before each of ours, since other work on the machine comes and goes
        benchmark.pedantic(
            ours,
            setup=lambda: slow_times.append(seconds(slow, rounds=1)) or ((decoder, prompts), {}),
            rounds=2,
            warmup_rounds=0,
        )
        slow_seconds, fast_seconds = statistics.median(slow_times), statistics.median(benchmark.stats.stats.data)
        peaks = SimpleNamespace(fast=peak_mebibytes(lambda: ours(decoder, prompts)), slow=peak_mebibytes(slow_one))
    finally:
        torch.set_num_threads(threads)
    ratio = slow_seconds / fast_seconds
    benchmark.extra_info |= {"times_faster": ratio, "images_per_second": batch / fast_seconds, **vars(peaks)}
    print(
        f"\nvocabulary {decoder.vocabulary.total}, batch {batch}: {batch / fast_seconds:.2f} images/s, {ratio:.2f} x"
        f" the straightforward {batch / slow_seconds:.2f}; peak {peaks.fast:.0f} against {peaks.slow:.0f} MiB"
    )
    assert ratio >= least


class Coins(StepJudge):
    """Finds a fifth of what it sees clear, and half of that without potential."""

    def cache_key(self):
        return type(self).__name__

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        clear, potential = torch.rand(2, len(pixels), generator=self.generator)
        return clear - 0.3, potential

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return torch.rand(len(pixels), generator=self.generator)


def test_pruning_saves_a_fifth_of_the_decoders_steps(benchmark: BenchmarkFixture) -> None:
    decoder = build(64, 64, dim=64, depth=2)
    decoder.image_tokenizer.decode = lambda tokens: tokens.float()[:, None, None]  # type: ignore[method-assign]
    rows, passes = [{"prompt": prompt} for prompt in PROMPTS[:2]], []

    def decode(prune: bool) -> None:
        strategy = Potential(SAMPLING, 8, "judge", prune)
        decoded = strategy.decode(decoder, {"judge": Coins()}, Request(rows, range(len(rows))))
        passes.append(decoded.cost.decoder_passes)

    decode(False)
    benchmark.pedantic(decode, (True,), rounds=1, warmup_rounds=0)
    saved = 1 - passes[1] / passes[0]
    benchmark.extra_info["steps_saved"] = saved
    print(f"\npruning saves {saved:.0%} of the decoder's steps")
    assert saved >= 0.2
