"""The pipeline: jobs that build on one another, run for several seeds, and one table of what they score."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_modules.files import write_text
from lightning_modules.jsonl import read_jsonl
from lightning_modules.report.pictures import save_figure
from lightning_modules.report.results import StrategyResult
from lightning_modules.report.tables import print_table, write_csv
from lightning_modules.rewards.geneval_metadata import TASKS
from lightning_modules.runs.checkpoints import quoted


@dataclass(frozen=True)
class Job:
    """A run of train.py, by overrides in which `<NAME>` stands for the folder of the job NAME of the same seed."""

    overrides: Sequence[str]
    makes: str = "geneval.json"  # is in its folder when it is done


@dataclass(frozen=True)
class Row:
    """A row of the table: what a job's decoder scores by a strategy."""

    job: str
    strategy: str


class Pipeline:
    """Runs the jobs that are not done yet, or resumes them, in order; writes pipeline.csv, .json, .md and .png.

    Args:
        folder: of everything; a job runs in <folder>/seed-<seed>/<job>.
        jobs: by name, each after those that it builds on.
        rows: of the table, by title; the first is what the others are compared with.
    """

    def __init__(self, folder: str, seeds: Sequence[int], jobs: Mapping[str, Job], rows: Mapping[str, Row]) -> None:
        for title, row in rows.items():
            if row.job not in jobs:
                raise ValueError(f"pipeline.rows: {title!r} names the job {row.job!r}; there are: {', '.join(jobs)}")
        if not seeds:
            raise ValueError("pipeline.seeds is empty")
        self.folder, self.seeds, self.jobs, self.rows = Path(folder), seeds, jobs, rows

    def run(self) -> None:
        """Run the jobs; the table is written anew after each seed."""
        todo = [(seed, name) for seed in self.seeds for name in self.jobs if not self._is_done(seed, name)]
        for number, (seed, name) in enumerate(todo, 1):
            print(f"Pipeline: job {number} of {len(todo)}, {name}, seed {seed}", flush=True)
            self._run_job(seed, name)
            if name == list(self.jobs)[-1]:
                self.report()
        self.report()

    def _folder_of(self, seed: int, name: str) -> Path:
        return self.folder / f"seed-{seed}" / name

    def _is_done(self, seed: int, name: str) -> bool:
        return (self._folder_of(seed, name) / self.jobs[name].makes).is_file()

    def _run_job(self, seed: int, name: str) -> None:
        folder = self._folder_of(seed, name)
        overrides = [f"seed={seed}", f"hydra.run.dir={quoted(folder)}", *self.jobs[name].overrides]
        for other in self.jobs:
            overrides = [item.replace(f"<{other}>", str(self._folder_of(seed, other))) for item in overrides]
        last = folder / "checkpoints" / "last.ckpt"
        if last.is_file():
            overrides.append(f"ckpt_path={quoted(last)}")
        stopped = False
        with subprocess.Popen([sys.executable, sys.argv[0], *overrides]) as job:

            def stop(*_: Any) -> None:
                nonlocal stopped
                stopped = True
                job.terminate()  # it saves first

            before = signal.signal(signal.SIGTERM, stop)
            try:
                job.wait()
            except KeyboardInterrupt:  # which the job got as well
                stopped = True
                job.wait()
            finally:
                signal.signal(signal.SIGTERM, before)
        if stopped:
            print(f"Pipeline: stopped in job {name} of seed {seed}; the same command goes on there", flush=True)
            sys.exit(job.returncode if job.returncode >= 0 else 128 - job.returncode)
        if job.returncode or not self._is_done(seed, name):
            raise ValueError(f"pipeline: the job {name!r} of seed {seed} ended with {job.returncode}; see {folder}")

    def report(self) -> None:
        """Write and print the table of the seeds whose jobs are all done."""
        seeds = [seed for seed in self.seeds if all(self._is_done(seed, name) for name in self.jobs)]
        if not seeds:
            return
        results = {title: self._result(title, row, seeds) for title, row in self.rows.items()}
        base = next(iter(results.values()))
        table = [_table_row(title, result, base) for title, result in results.items()]
        report = {"benchmark": "GenEval", "seeds": seeds, "images_per_row": len(base.rows), "rows": table}
        write_text(self.folder / "pipeline.json", json.dumps(report, indent=2) + "\n")
        columns = [key for key in table[0] if key != "row"]
        lines = ["| row | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {row['row']} | " + " | ".join(str(row[key]) for key in columns) + " |" for row in table]
        write_text(self.folder / "pipeline.md", "\n".join(lines) + "\n")
        write_csv(table, self.folder / "pipeline.csv")
        _plot(table, self.folder / "pipeline.png")
        print_table(results)

    def _result(self, title: str, row: Row, seeds: Sequence[int]) -> StrategyResult:
        images: list[dict[str, Any]] = []
        reports = []
        for seed in seeds:
            folder = self._folder_of(seed, row.job)
            strategies = json.loads((folder / "geneval.json").read_text(encoding="utf-8"))["strategies"]
            if row.strategy not in strategies:
                known = ", ".join(strategies)
                raise ValueError(f"pipeline.rows: {title!r} names the strategy {row.strategy!r}; there are: {known}")
            reports.append(strategies[row.strategy])
            found = read_jsonl(folder / "results.jsonl")
            images += [image for _, image in found if image["filename"].startswith(f"{row.strategy}/")]
        tasks = {task: float(np.mean([report["tasks"][task] for report in reports])) for task in TASKS}
        keys = ("overall", "decoder_passes_per_image", "verifier_calls_per_image", "seconds_per_image",
                "objects_per_image")  # fmt: skip
        means: Any = {key.removesuffix("_per_image"): float(np.mean([each[key] for each in reports])) for key in keys}
        return StrategyResult(name=title, tasks=tasks, rows=images, thumbnails={}, independent={}, **means)


def _table_row(title: str, result: StrategyResult, base: StrategyResult) -> dict[str, Any]:
    low, high = result.interval()
    gain, gain_low, gain_high = result.gain_over(base)
    scores = {**result.tasks, "overall": result.overall, "low_95": low, "high_95": high}
    scores |= {"gain": gain, "gain_low_95": gain_low, "gain_high_95": gain_high}
    return {
        "row": title,
        **{name: round(value, 4) for name, value in scores.items()},
        "decoder_passes_per_image": round(result.decoder_passes, 1),
        "verifier_calls_per_image": round(result.verifier_calls, 1),
        "seconds_per_image": round(result.seconds, 4),
        "objects_per_image": round(result.objects, 3),
    }


def _plot(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 0.5 * len(table) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    overall = np.array([row["overall"] for row in table])
    below, above = (np.array([row[key] for row in table]) for key in ("low_95", "high_95"))
    axes.barh([row["row"] for row in table], overall, xerr=[overall - below, above - overall], color="tab:blue")
    axes.axvline(overall[0], color="gray", linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="GenEval, 95 % interval over prompts", xlim=(0, 1))
    save_figure(figure, path)
