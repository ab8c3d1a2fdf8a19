"""The jobs of Janus, as they are typed, on random weights of two layers."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from tests.helpers.launch import command


@pytest.mark.slow
def test_janus_is_measured_by_every_strategy_of_the_paper(tmp_path: Path) -> None:
    two = ["strategies.best_of_n.n=2", "strategies.stepwise.k=2", "strategies.potential.n=2"]
    done = command(tmp_path, "experiment=janus_evaluate", "+debug=tiny_janus", *two, "trainer.precision=bf16-true")
    lines = done.stdout.splitlines()
    estimate = next(i for i, line in enumerate(lines) if line.startswith("Memory of each GPU: about "))
    assert estimate < next(i for i, line in enumerate(lines) if "strategy" in line)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert list(report["strategies"]) == ["sample", "best_of_n", "stepwise", "potential"]
    costs = {name: scores["decoder_passes_per_image"] for name, scores in report["strategies"].items()}
    assert costs["sample"] == 2 * 144 and costs["best_of_n"] == 2 * 2 * 144 >= costs["potential"]
    calls = {name: scores["verifier_calls_per_image"] for name, scores in report["strategies"].items()}
    assert calls["stepwise"] == 3 * 2  # two candidates, every four rows of 12 tokens


@pytest.mark.slow(seconds=25)
def test_parm_learns_from_janus_and_chooses_its_tokens(tmp_path: Path) -> None:
    few = ["callbacks.geneval.test_strategies=[sample,verified]", "callbacks.geneval.monitor=sample",
           "callbacks.geneval.validation_strategies=[sample]", "data.train.plain.samples=2",
           "data.validation.samples=2", "data.test.samples=2", "strategies.verified.k=2"]  # fmt: skip
    command(tmp_path, "experiment=janus_parm", "+debug=tiny_janus", *few)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert list(report["strategies"]) == ["sample", "verified"] and report["prompts"] == 6
    assert report["strategies"]["verified"]["decoder_passes_per_image"] == 2 * 144


@pytest.mark.slow(seconds=25)
def test_adapters_of_the_larger_janus_are_aligned_to_its_own_rollouts(tmp_path: Path) -> None:
    by_the_judge = "+data.scores.vision_language=0.1"  # GenEval's rules find none of these random images better
    job = ["experiment=janus_dpo", "decoder=janus_pro_7b", "data=preferences", by_the_judge, "+debug=tiny_janus"]
    command(tmp_path, *job)
    (pairs,) = (tmp_path / "rollouts").glob("train-pairs-*")
    assert len(datasets.load_from_disk(str(pairs))["chosen"][0]) == 144
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    again = command(tmp_path, *job, "task=evaluate", "ckpt_path=run/checkpoints/last.ckpt", "hydra.run.dir=again")
    assert "Results in again" in again.stdout


@pytest.mark.slow(seconds=25)
def test_adapters_of_the_larger_janus_are_reinforced(tmp_path: Path) -> None:
    few = ["data.spec.samples=2", "data.spec.refills=0", "trainer.accumulate_grad_batches=1", "trainer.max_steps=2"]
    by_the_judge = "+data.rewards.vision_language=0.1"  # GenEval's rules find none of these random images better
    command(tmp_path, "experiment=janus_grpo", "decoder=janus_pro_7b", "+debug=tiny_janus", *few, by_the_judge)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    assert all(".lora_" in key for key in state)
    assert any(weight.any() for key, weight in state.items() if "lora_B" in key)  # they start at 0
