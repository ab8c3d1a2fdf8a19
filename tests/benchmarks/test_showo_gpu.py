"""Show-o at full size on a GPU, random weights: pytest tests/benchmarks/test_showo_gpu.py --benchmark-only -n 0

Images/s of the sampler by itself and compiled, against the straightforward one of `test_showo_speed`; DPO tokens/s.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader

from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.showo import ShowO
from lightning_modules.dpo import DPOModule, dpo
from tests.helpers.measuring import seconds
from tests.helpers.straightforward import PROMPTS, SAMPLING, build, ours, straightforward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GRID = 258  # positions of a pass over an image


def full_size() -> ShowO:
    with torch.device("cuda"):
        return build(50295, 8192, dim=2048, depth=24, heads=32)


def multiplications(decoder: ShowO, positions: int) -> float:
    """Multiplications and additions of the layers' matrix products for some positions."""
    return 2.0 * positions * sum(w.numel() for w in decoder.transformer.parameters() if w.ndim == 2)


@pytest.fixture(scope="module")
def decoder() -> Iterator[ShowO]:
    yield full_size().bfloat16()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def matrix_rate() -> float:
    """Multiplications and additions a second of a large product of bfloat16 matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()

    multiply()
    return 20 * 2 * 8192**3 / seconds(multiply)


@pytest.fixture(scope="module")
def slow_seconds(decoder: ShowO) -> float:
    """Of an image of the straightforward sampler."""
    straightforward(decoder, PROMPTS[0], 0)
    return seconds(lambda: straightforward(decoder, PROMPTS[0], 0).cpu())


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("batch", [1, 20, 80])
def test_images_per_second(
    benchmark: BenchmarkFixture, decoder: ShowO, matrix_rate: float, slow_seconds: float, batch: int, compiled: bool
) -> None:
    decoder.compiled = compiled
    prompts = (PROMPTS * batch)[:batch]
    first = seconds(lambda: ours(decoder, prompts).cpu(), rounds=1)
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(lambda: ours(decoder, prompts).cpu(), rounds=2)
    taken = statistics.median(benchmark.stats.stats.data)
    share = multiplications(decoder, 2 * batch * SAMPLING.steps * GRID) / taken / matrix_rate
    peak = torch.cuda.max_memory_allocated() / 2**30
    ratio = slow_seconds * batch / taken
    benchmark.extra_info |= {"images_per_second": batch / taken, "share_of_matrix_rate": share, "times_faster": ratio}
    print(
        f"\nbatch {batch}, {'compiled' if compiled else 'as it is'}: {batch / taken:.2f} images/s, {share:.0%} of"
        f" {matrix_rate / 1e12:.0f} TFLOP/s, {ratio:.1f} x the straightforward {1 / slow_seconds:.2f} images/s;"
        f" peak {peak:.1f} GiB, first call {first:.1f} s"
    )
    assert ratio > 1


class Clock(Callback):
    """When each step of training was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all activations kept"])
def test_dpo_tokens_per_second(benchmark: BenchmarkFixture, matrix_rate: float, checkpointing: bool) -> None:
    pairs, decoder = 10, full_size()
    decoder.estimate = MaskEstimate(n_masks=1)  # as conf/decoder/showo.yaml has it
    decoder.transformer.config = replace(decoder.transformer.config, checkpointing=checkpointing)
    optimizer = partial(torch.optim.AdamW, lr=1e-6)
    module = DPOModule(decoder, None, optimizer, 1, partial(dpo, beta=0.1), 0.0, 1e9, None, 0.0)
    images = torch.randint(0, 8192, (2, pairs, 256))
    batch = {
        "prompt": (PROMPTS * pairs)[:pairs],
        "chosen": images[0],
        "rejected": images[1],
        "ref_chosen": [0.0] * pairs,
        "ref_rejected": [0.0] * pairs,
        "seed": list(range(pairs)),
        "weight": torch.ones(pairs),
    }
    clock = Clock()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=10,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    loader = DataLoader([batch] * 10, batch_size=None)  # type: ignore[arg-type]
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(lambda: trainer.fit(module, loader), rounds=1)
    taken = statistics.median(after - before for before, after in zip(clock.times[3:], clock.times[4:], strict=False))
    peak = torch.cuda.max_memory_allocated() / 2**30
    share = 3 * multiplications(decoder, 2 * pairs * GRID) / taken / matrix_rate
    rate = 2 * pairs * 256 / taken
    benchmark.extra_info |= {"tokens_per_second": rate, "share_of_matrix_rate": share, "peak_gibibytes": peak}
    print(f"\nDPO of {pairs} pairs: {rate:.0f} image tokens/s, {share:.0%} of the matrix rate; peak {peak:.1f} GiB")
    assert share > 0.1
