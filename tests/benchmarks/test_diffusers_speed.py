"""Search on pipelines of diffusers against a loop of single calls: pytest tests/benchmarks --benchmark-only -n 0

The pipeline is tiny, so that most of its time is overhead, which grows with calls and not with images.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.pipelines.decoder import PipelineDecoder, PipelineSampling
from lightning_modules.backbone.tiny_pipeline import save_tiny_sd3
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.verifier import Reward
from tests.helpers.overrides import WITHOUT
from tests.helpers.pipelines import tiny_sdxl

N, SIZE, SAMPLING = 8, 32, PipelineSampling(steps=8, guidance=5.0)
ROWS = [{"prompt": f"a photo of a {name}"} for name in ("dog", "red cup", "star", "cow")]


class Green(Reward):
    """Likes green."""

    def cache_key(self) -> Any:
        return "green"

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return pixels[:, 1].mean((1, 2))


def by_loop(pipeline: Any, seeds: Sequence[int]) -> Tensor:
    """The best of N images of each prompt, an image a call."""
    best = []
    for i, row in enumerate(ROWS):
        images = [
            pipeline(
                row["prompt"], num_inference_steps=SAMPLING.steps, guidance_scale=SAMPLING.guidance, height=SIZE,
                width=SIZE, generator=torch.Generator().manual_seed(seed), output_type="pt",
            ).images
            for seed in seeds[N * i : N * (i + 1)]
        ]  # fmt: skip
        scores = [float(Green()([row], image)) for image in images]
        best.append(images[scores.index(max(scores))])
    return torch.cat(best)


# Text of 333 tokens, most of them padding, is what the tiny network of SD3 is busy with.
@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(("name", "least"), [("sd3", 2), ("sdxl", 5)])
def test_best_of_8_against_a_loop_of_single_calls(
    benchmark: BenchmarkFixture, tmp_path: Path, name: str, least: float
) -> None:
    folder = save_tiny_sd3(f"{tmp_path}/sd3") if name == "sd3" else tiny_sdxl(tmp_path / "sdxl")
    decoder = PipelineDecoder(folder, SIZE, "float32", WITHOUT if name == "sd3" else ())
    request, strategy = Request(ROWS, range(len(ROWS))), BestOfN(Sample(SAMPLING), n=N, judge="green")
    seeds = request.repeat(N).seeds

    def ours() -> Tensor:
        return decoder.image_tokenizer.decode(strategy.decode(decoder, {"green": Green()}, request).tokens)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = ours()
        start = time.thread_time()  # of the processor, which other work on the machine hardly changes
        expected = by_loop(decoder.pipeline, seeds)
        slow = time.thread_time() - start
        assert torch.allclose(found, expected, atol=1e-4)
        benchmark.pedantic(ours, rounds=2, warmup_rounds=0)
    finally:
        torch.set_num_threads(threads)
    fast, images = statistics.median(benchmark.stats.stats.data), len(ROWS) * N
    benchmark.extra_info["times_faster"] = slow / fast
    print(f"\n{name}: {images / fast:.0f} images/s, {slow / fast:.1f} x the loop's {images / slow:.0f}")
    assert slow >= least * fast
