"""GenEval's summary against numbers and printout of the official script; the metric against the summary."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.rewards.geneval_metadata import TASKS
from lightning_modules.rewards.geneval_metric import GenEvalMetric, summarize

GOLDEN = Path(__file__).parents[1] / "golden" / "geneval" / "summary_case.json.gz"
MAIN = json.loads(gzip.decompress(GOLDEN.read_bytes()))
TABLES = [pytest.param(table, id=table["name"]) for table in (MAIN, *MAIN["extra"])]


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], torch.Tensor]:
    return [row["tag"] for row in rows], torch.tensor([row["correct"] for row in rows])


@pytest.mark.parametrize("table", TABLES)
def test_summary_agrees_with_the_official_script(table: dict[str, Any]) -> None:
    summary, expected = summarize(table["rows"]), table["expected"]
    assert (summary.total_images, summary.total_prompts) == (
        expected["total_images"],
        expected["total_prompts"],
    )
    assert summary.correct_images == pytest.approx(expected["correct_images"], abs=1e-12)
    assert summary.correct_prompts == pytest.approx(expected["correct_prompts"], abs=1e-12)
    assert summary.overall == pytest.approx(expected["overall"], abs=1e-12)
    assert list(summary.tasks) == expected["task_order"]
    for tag, task in expected["tasks"].items():
        ours = summary.tasks[tag]
        assert (ours.correct, ours.total) == (task["correct"], task["total"])
        assert ours.score == pytest.approx(task["score"], abs=1e-12)
    assert str(summary) == expected["stdout"]


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no GenEval results"):
        summarize([])


@pytest.mark.parametrize("table", TABLES)
def test_metric_equals_summary(table: dict[str, Any]) -> None:
    tags, correct = columns(table["rows"])
    metric = GenEvalMetric()
    for start in range(0, len(tags), 16):
        metric.update(tags[start : start + 16], correct[start : start + 16].tolist())
    summary = summarize(table["rows"])
    scores = {name: score.item() for name, score in metric.compute().items()}
    assert list(scores) == [*(task for task in TASKS if task in summary.tasks), "overall"]
    expected = {tag: task.score for tag, task in summary.tasks.items()} | {"overall": summary.overall}
    assert scores == pytest.approx(expected, abs=1e-6)


def test_metric_adds_up_over_ranks() -> None:
    tags, correct = columns(MAIN["rows"])
    whole, other = GenEvalMetric(), GenEvalMetric()
    whole.update(tags, correct)
    other.update(tags[1::2], correct[1::2])

    def gather(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        """Stand in for the collective: this rank's state and the same one of the other rank."""
        return [state, other.correct if state is metric.correct else other.total]

    metric = GenEvalMetric(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(tags[::2], correct[::2])
    assert metric.compute() == whole.compute()

    assert metric.total.sum() == len(tags[::2]), "after the sync each rank has its own share again"
    other.merge_state(metric)
    assert torch.equal(other.correct, whole.correct)
    assert torch.equal(other.total, whole.total)


def test_metric_with_empty_batches_and_reset() -> None:
    metric = GenEvalMetric()
    metric.update([], [])
    scores = metric.compute()
    assert list(scores) == ["overall"]
    assert math.isnan(scores["overall"])
    metric.update(["colors"], [True])
    assert metric.compute() == {"colors": torch.tensor(1.0), "overall": torch.tensor(1.0)}
    metric.reset()
    assert metric.total.sum() == 0


def test_metric_refuses_what_it_cannot_count() -> None:
    metric = GenEvalMetric()
    with pytest.raises(ValueError, match=r"unknown GenEval tags \['color'\]"):
        metric.update(["color"], [True])
    with pytest.raises(ValueError, match=r"2 tags need verdicts of shape \[2\], found \[1\]"):
        metric.update(["colors", "colors"], [True])
    assert metric.total.sum() == 0
