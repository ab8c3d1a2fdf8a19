"""The job of Stable Diffusion 3, as it is typed, on random weights of few channels."""

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command


@pytest.mark.slow
def test_stable_diffusion_3_is_measured_by_every_strategy(tmp_path: Path) -> None:
    few = ["strategies.best_of_n.n=2", "strategies.particles.n=2", "strategies.potential.n=2"]
    half = ["trainer.precision=bf16-true", "decoder.dtype=bfloat16"]
    done = command(tmp_path, "experiment=sd3_evaluate", "+debug=tiny_sd3", *few, *half)
    lines = done.stdout.splitlines()
    estimate = next(i for i, line in enumerate(lines) if line.startswith("Memory of each GPU: about "))
    assert estimate < next(i for i, line in enumerate(lines) if "strategy" in line)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    passes = {name: scores["decoder_passes_per_image"] for name, scores in report["strategies"].items()}
    assert list(passes) == ["sample", "best_of_n", "particles", "potential", "reflection"]
    assert passes["sample"] == 4 * 2 and passes["best_of_n"] == passes["particles"] == 2 * 4 * 2 >= passes["potential"]
    assert (passes["reflection"] - passes["sample"]) * 6 % (2 * 2) == 0  # rounds of 2 steps, of 6 images
    calls = {name: scores["verifier_calls_per_image"] for name, scores in report["strategies"].items()}
    assert calls["best_of_n"] == 2 and calls["particles"] == 2 * 2
    assert (tmp_path / "run" / "page.html").stat().st_size > 1000
