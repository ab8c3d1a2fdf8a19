"""CheckpointCurve: GenEval of all checkpoints of a folder, in one table and one plot over steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from lightning_modules.artifacts import ArtifactCache
from lightning_modules.broken_files import read_json
from lightning_modules.evaluator import Evaluation, Evaluator
from lightning_modules.report.pictures import save_figure
from lightning_modules.report.report import write_report
from lightning_modules.report.results import RunInfo
from lightning_modules.report.tables import print_plain, write_csv
from lightning_modules.rewards.geneval_metadata import TASKS
from lightning_modules.runs.checkpoints import load_checkpoint, read_checkpoint

OnDevice = Callable[[torch.device], Evaluation]


class CheckpointCurve(LightningModule):
    """Evaluates every checkpoint of a folder as the end of training would; the Trainer brings device and ranks.

    An evaluation that is complete is a folder in `results`, named by the weights and settings that decide it: what is
    there is not evaluated again.

    Args:
        evaluation: tells, from a device, what is evaluated.
        paths: of the checkpoints, which are of `module`.
        run: for titles.
    """

    def __init__(
        self,
        module: LightningModule,
        evaluator: Evaluator,
        evaluation: OnDevice,
        paths: Sequence[str],
        results: str,
        run: RunInfo,
    ) -> None:
        super().__init__()
        steps = {path: int(read_checkpoint(path)["global_step"]) for path in paths}
        self.steps = dict(sorted(steps.items(), key=lambda item: item[1]))
        self.module, self.evaluator, self.evaluation, self.info = module, evaluator, evaluation, run
        self.results = ArtifactCache(results, __name__)
        self.evaluated: dict[str, Path] = {}

    def run(self, trainer: Trainer, folder: Path) -> None:
        """Evaluate what has not been evaluated yet, then write checkpoints.csv and checkpoints.png into a folder."""
        trainer.test(self, verbose=False)
        if trainer.is_global_zero:
            self._report(trainer, folder)

    def test_dataloader(self) -> list[str]:
        """All checkpoints on every rank: ranks share the prompts."""
        return list(self.steps)

    def setup(self, stage: str) -> None:
        self.evaluator.prepare(self.evaluation(self.trainer.strategy.root_device))

    def test_step(self, batch: str, batch_idx: int) -> None:
        load_checkpoint(self.module, batch)
        evaluation = self.evaluation(self.device)
        key = self.evaluator.cache_key(evaluation)
        folder = self.results.path("checkpoint", key)
        if not self.trainer.strategy.broadcast(folder.is_dir()):
            self.results.open()
            with self.evaluator.resumed(evaluation, lambda: self.trainer.received_sigterm) as result:
                if self.trainer.is_global_zero:
                    about = replace(self.info, weights=Path(batch).name)
                    self.results.get("checkpoint", key, partial(write_report, evaluation=result, run=about))
                    print(*result.warnings, sep="\n", end="\n" if result.warnings else "")
        self.evaluated[batch] = folder

    def _report(self, trainer: Trainer, folder: Path) -> None:
        table = []
        for path, evaluated in self.evaluated.items():
            report = read_json(evaluated / "geneval.json")
            if not isinstance(report, dict):
                raise ValueError(f"{evaluated}/geneval.json is no report: remove {evaluated}, and it is made again")
            log = {}
            for name, result in report["strategies"].items():
                about = {"checkpoint": Path(path).stem, "step": self.steps[path], "strategy": name}
                tasks = {task: result["tasks"].get(task) for task in TASKS}
                low, high = result["interval_95"]
                scores = {"overall": result["overall"], "low_95": low, "high_95": high, **tasks}
                table.append({**about, **scores, "results": str(evaluated)})
                log[f"test/geneval/{name}"] = result["overall"]
                log |= {f"test/geneval/{name}/{task}": score for task, score in result["tasks"].items()}
            for logger in trainer.loggers:
                logger.log_metrics(log, self.steps[path])
        for logger in trainer.loggers:
            logger.save()
        write_csv(table, folder / "checkpoints.csv")
        _plot(table, folder / "checkpoints.png")
        _print(table)


def _plot(table: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["strategy"] for row in table):
        rows = [row for row in table if row["strategy"] == name]
        steps = [row["step"] for row in rows]
        axes.plot(steps, [row["overall"] for row in rows], marker="o", label=name)
        axes.fill_between(steps, [row["low_95"] for row in rows], [row["high_95"] for row in rows], alpha=0.15)
    axes.set(xlabel="optimizer steps", ylabel="GenEval, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    save_figure(figure, path)


def _print(table: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["strategy"] for row in table))
    shown = Table(title="GenEval of checkpoints", box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("checkpoint", no_wrap=True)
    for heading in ("step", *names):
        shown.add_column(heading, justify="right", no_wrap=True)
    for (name, step), rows in groupby(table, key=lambda row: (row["checkpoint"], row["step"])):
        shown.add_row(name, str(step), *(f"{row['overall']:.3f}" for row in rows))
    print_plain(shown)
