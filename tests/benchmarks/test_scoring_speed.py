"""Scoring, batched against one image at a time: pytest tests/benchmarks/test_scoring_speed.py --benchmark-only -n 0"""

import statistics
from pathlib import Path

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from datamodules.shapes.detector import ShapesDetector
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.mask2former import Mask2FormerDetector
from tests.helpers.measuring import seconds


def compare(
    benchmark: BenchmarkFixture, what: str, reward: GenEvalReward, rows: list, images: np.ndarray, rounds: int
) -> float:
    """Times faster than one at a time; the verdicts have to be the same."""
    alone: list = []

    def one_at_a_time() -> None:
        alone[:] = [reward.verdicts([row], image[None])[0] for row, image in zip(rows, images, strict=True)]

    together = benchmark.pedantic(reward.verdicts, (rows, images), rounds=rounds, warmup_rounds=0)
    ratio = seconds(one_at_a_time, rounds) / (fast := statistics.median(benchmark.stats.stats.data))
    assert [verdict.reason for verdict in together] == [verdict.reason for verdict in alone]
    benchmark.extra_info |= {"images_per_second": len(images) / fast, "times_faster": ratio}
    print(f"\n{what}: {len(images) / fast:.2f} images/s, {ratio:.2f} x one at a time")
    return ratio


def test_shapes(benchmark: BenchmarkFixture) -> None:
    stream = ShapesStream()
    items = [stream[i] for i in range(256)]
    images = np.stack([item.image for item in items])
    rows = [item.metadata for item in items]
    assert compare(benchmark, "shapes", GenEvalReward(ShapesDetector()), rows, images, 3) >= 2


def test_mask2former_at_its_real_size(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Swin-S, 100 queries, 800 x 800 pixels, random weights. On a CPU arithmetic is the limit and a batch gains little;
    it must not lose, either."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=384, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80)).save_pretrained(
        tmp_path
    )
    reward = GenEvalReward(Mask2FormerDetector(str(tmp_path), batch_size=2))
    images = np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3), np.uint8)
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    assert compare(benchmark, "Mask2Former", reward, [row] * 2, images, 1) >= 0.8
