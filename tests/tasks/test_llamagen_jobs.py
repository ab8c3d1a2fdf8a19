"""LlamaGen as users run it: tiny, with a T5 of its own, measured, verified and aligned."""

import json
from pathlib import Path

import datasets
import pytest

from tests.helpers.launch import command

TINY = ["decoder=llamagen_256", "+debug=tiny_llamagen"]


@pytest.mark.slow
def test_llamagen_is_measured_by_every_strategy_of_the_paper(tmp_path: Path) -> None:
    two = ["strategies.best_of_n.n=2", "strategies.stepwise.k=2", "strategies.potential.n=2"]
    done = command(tmp_path, "experiment=llamagen_evaluate", *TINY, *two, "trainer.precision=bf16-true")
    assert "Memory of each GPU: about " in done.stdout
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    costs = {name: scores["decoder_passes_per_image"] for name, scores in report["strategies"].items()}
    assert list(costs) == ["sample", "best_of_n", "stepwise", "potential"]
    assert costs["sample"] == 2 * 144 and costs["best_of_n"] == 4 * 144


@pytest.mark.slow
def test_parm_learns_from_llamagen_and_verifies_it(tmp_path: Path) -> None:
    few = ["callbacks.geneval.test_strategies=[sample,verified]", "callbacks.geneval.monitor=sample",
           "callbacks.geneval.validation_strategies=[sample]", "data.train.plain.samples=2",
           "data.validation.samples=2", "data.test.samples=2", "strategies.verified.k=2"]  # fmt: skip
    command(tmp_path, "experiment=janus_parm", *TINY, *few)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert list(report["strategies"]) == ["sample", "verified"] and report["prompts"] == 6


@pytest.mark.slow
def test_llamagen_is_aligned_to_its_own_rollouts(tmp_path: Path) -> None:
    by_the_judge = "+data.scores.vision_language=0.1"  # GenEval's rules find none of these random images better
    command(tmp_path, "experiment=janus_dpo", "data=preferences", *TINY, by_the_judge)
    (pairs,) = (tmp_path / "rollouts").glob("train-pairs-*")
    rows = datasets.load_from_disk(str(pairs))
    assert len(rows["chosen"][0]) == 144 and all(margin > 0 for margin in rows["margin"])
