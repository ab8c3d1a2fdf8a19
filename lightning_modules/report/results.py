"""Results of an evaluation: rows of results.jsonl, scores of strategies with their intervals."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.files import write_text
from lightning_modules.report.drawing import TraceView
from lightning_modules.rewards.geneval_rules import Verdict

SIDE_BY_SIDE = "side_by_side"  # name of the sheet that has all strategies
BEFORE_TRAINING = "_before_training"  # ends the names of rows whose verifier is the untrained one
COSTS = {"decoder_passes": "decoder passes", "verifier_calls": "verifier calls", "seconds": "seconds"}  # of an image


@dataclass(frozen=True)
class RunInfo:
    """Which run an evaluation is of, for titles.

    Attributes:
        name: of the run.
        overrides: of its config, as they were typed.
        weights: those that were evaluated, in words.
    """

    name: str
    overrides: Sequence[str]
    weights: str = ""


def format_cost(name: str, cost: float) -> str:
    """Write a cost of an image, by its name in `COSTS`, as tables have it."""
    return f"{cost:.3f}" if name == "seconds" else f"{cost:.0f}"


def result_row(filename: str, metadata: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """An image's row of results.jsonl, in the official columns."""
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(verdict.details),
    }


def result_line(row: Mapping[str, Any]) -> str:
    """A row as the official evaluation writes it, byte for byte: compact, with its slashes escaped."""
    return json.dumps(row, separators=(",", ":")).replace("/", r"\/")


def write_report_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write geneval.json: numbers of six decimals, more than any of them is sure of, and null for what is no number."""
    write_text(path, json.dumps(_rounded(report), indent=2) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


@dataclass(frozen=True)
class StrategyResult:
    """One strategy's images and scores.

    Attributes:
        name: of the strategy.
        overall: mean of the task means.
        tasks: fraction of correct images of each task.
        rows: one an image, with the columns of GenEval's results.jsonl.
        thumbnails: uint8 [H, W, 3] of some prompts' first images, by prompt index.
        decoder_passes: forward passes of the decoder an image, with and without the prompt counted apart.
        verifier_calls: values asked of a judge, an image.
        seconds: wall time an image, summed over ranks.
        objects: found in an image.
        independent: mean scores of `independent_judges`, by name, and FID.
        tokens: image tokens that went through the decoder, an image.
        image_decodes: images made for judges to see, an image.
        stats: means of what a strategy measures of its images, by name.
        traces: how the images of `thumbnails` were made.
    """

    name: str
    overall: float
    tasks: dict[str, float]
    rows: list[dict[str, Any]]
    thumbnails: dict[int, np.ndarray]
    decoder_passes: float
    verifier_calls: float
    seconds: float
    objects: float
    independent: dict[str, float]
    tokens: float = 0.0
    image_decodes: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)
    traces: dict[int, TraceView] = field(default_factory=dict)

    def row_of(self, index: int) -> dict[str, Any]:
        """The row of the first image of prompt `index`."""
        return next(row for row in self.rows if int(row["filename"].split("/")[0]) == index)

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `overall` over prompts; 0 to 1 where a task has only one, which says nothing."""
        prompts = {(row["tag"], row["prompt"]) for row in self.rows}
        if min(Counter(tag for tag, _ in prompts).values()) == 1:
            return 0.0, 1.0
        low, high = np.quantile(_resampled([self]), [0.025, 0.975])
        return float(low), float(high)

    @property
    def title(self) -> str:
        """The name, as people read it."""
        return self.row_title + " (before training)" * self.is_untrained

    @property
    def is_untrained(self) -> bool:
        """Its verifier is the untrained one."""
        return self.name.endswith(BEFORE_TRAINING)

    @property
    def row_title(self) -> str:
        """The name, below a heading that says before or after training."""
        return self.name.removesuffix(BEFORE_TRAINING)

    def costs(self) -> dict[str, float]:
        """What an image costs, by the names of `COSTS`."""
        return {name: getattr(self, name) for name in COSTS}

    def gain_over(self, base: "StrategyResult") -> tuple[float, float, float]:
        """`overall` above that of another result on the same prompts, with its 95 % bootstrap interval."""
        own, other = _resampled([self, base])
        low, high = np.quantile(own - other, [0.025, 0.975])
        return self.overall - base.overall, float(low), float(high)


def _resampled(results: Sequence[StrategyResult], resamples: int = 2000) -> np.ndarray:
    """Bootstrap samples of `overall` of results on the same prompts, [len(results), resamples].

    Distinct prompts are resampled within their task, with all their images: images of one prompt are not independent,
    and neither are rows that repeat a prompt. All results are given the same prompts, so that differences are paired.
    """
    rng = np.random.default_rng(0)
    means = []
    for task in results[0].tasks:
        counts: dict[str, np.ndarray] = {}  # of a prompt: correct images and images, of each result
        for i, result in enumerate(results):
            for row in result.rows:
                if row["tag"] == task:
                    entry = counts.setdefault(row["prompt"], np.zeros((len(results), 2), np.int64))
                    entry[i] += (row["correct"], 1)
        table = np.stack(list(counts.values()))
        drawn = table[rng.integers(0, len(table), (resamples, len(table)))].sum(1)
        means.append(drawn[..., 0] / drawn[..., 1])
    return np.mean(means, axis=0).T


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, the same on all ranks.

    Attributes:
        settings: how images were made and judged, for reports.
        warnings: why scores are ceilings, or not those of the official benchmark, a sentence each.
        strategies: results by name.
        ceilings: names of strategies that choose by what they are measured by.
    """

    settings: Mapping[str, Any]
    warnings: Sequence[str]
    strategies: Mapping[str, StrategyResult]
    ceilings: Sequence[str] = ()

    @property
    def amount(self) -> str:
        """How many images the scores are of, in words."""
        prompts, each = self.settings["prompts"], self.settings["images_per_prompt"]
        return f"{prompts} prompts, {each} image{'s' if each > 1 else ''} each, seed {self.settings['seed']}"

    def scores(self, stage: str) -> dict[str, float]:
        """Return what is logged of every strategy: scores with intervals, costs, objects, what other judges say."""
        scores = {}
        for name, result in self.strategies.items():
            low, high = result.interval()
            scores[f"{stage}/geneval/{name}"] = result.overall
            scores |= {f"{stage}/geneval/{name}/{task}": score for task, score in result.tasks.items()}
            scores |= {f"{stage}/interval_low/{name}": low, f"{stage}/interval_high/{name}": high}
            scores |= {f"{stage}/{cost}/{name}": value for cost, value in result.costs().items()}
            scores[f"{stage}/objects/{name}"] = result.objects
            scores |= {f"{stage}/independent/{judge}/{name}": mean for judge, mean in result.independent.items()}
        return scores
