"""W&B sweeps: points of every file run and log the metric that is watched; the multirun beside it has the same ones."""

import csv
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args, make_launch_sweep_entrypoint

from lightning_modules.tasks.run import run
from tests.helpers.launch import command
from tests.helpers.overrides import ROOT, SMALL_DPO, SMALL_GRPO, SMALL_PARM
from tests.helpers.wandb_runs import history, settings_of, table

SWEEPS = sorted((ROOT / "conf" / "sweep").glob("*.yaml"))
SMALL = {
    "dpo": [*SMALL_DPO, "data.batch_size=8"],
    "grpo": [*(each for each in SMALL_GRPO if "samples" not in each), "data.rounds=1", "trainer.max_epochs=1"],
    "parm": SMALL_PARM,
    "decoding": SMALL_PARM,
    "reflection": SMALL_PARM,
}
POINTS = 2
OFFLINE = "logger.wandb.offline=false"


def sweep_of(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A sweep, and the overrides that its command fixes for all points."""
    sweep = yaml.safe_load(path.read_text())
    env, interpreter, program, *fixed, point = sweep["command"]
    assert (env, interpreter, program, point) == ("${env}", "${interpreter}", "${program}", "${args_no_hyphens}")
    assert sweep["program"] == "train.py" and OFFLINE in fixed
    return sweep, [item for item in fixed if item != OFFLINE]


def agents_overrides(sweep: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """What an agent of W&B puts on the command line of a point, by its own code."""
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in point.items()}})
    fixed, drawn = make_launch_sweep_entrypoint(args, list(sweep["command"]))
    assert fixed is not None and fixed[:3] == ["${env}", "${interpreter}", "${program}"]
    return [*fixed[3:], *drawn]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(POINTS))
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_points_run_and_log_the_metric(tmp_path: Path, compose_config: Any, path: Path, number: int) -> None:
    sweep, fixed = sweep_of(path)
    drawn = random.Random(f"{path.stem} {number}")
    point = {key: drawn.choice(space["values"]) for key, space in sweep["parameters"].items()}
    overrides = agents_overrides(sweep, point)
    for key, value in point.items():
        assert OmegaConf.select(compose_config(*overrides), key) == value
    # Two validations, as early termination counts them, each with a value of its own.
    tiny = [*SMALL[path.stem], "logger=csv", f"rollouts_dir={tmp_path}/rollouts", "trainer.max_steps=2",
            "trainer.val_check_interval=1", "trainer.check_val_every_n_epoch=1"]  # fmt: skip
    if "task=evaluate" not in fixed:
        tiny.append("callbacks.geneval.test_strategies=[sample]")
    run(compose_config(*(item for item in overrides if item != OFFLINE), *tiny))
    with (tmp_path / "metrics" / "metrics.csv").open() as file:
        logged = [row[sweep["metric"]["name"]] for row in csv.DictReader(file) if row.get(sweep["metric"]["name"])]
    assert logged and sweep["metric"]["goal"] == "maximize"
    assert len(logged) >= sweep.get("early_terminate", {}).get("min_iter", 1)


@pytest.mark.slow
def test_jobs_of_a_multirun_have_a_wandb_run_each(tmp_path: Path) -> None:
    small = [*SMALL_PARM, "logger=default", "task=evaluate", "callbacks.geneval.test_strategies=[verified]"]
    command(tmp_path, *small, "strategies.verified.k=2,3", f"hydra.sweep.dir={tmp_path}/jobs", "--multirun")
    for job, k in enumerate((2, 3)):
        (path,) = (tmp_path / "jobs" / str(job)).glob("wandb/*run-*/run-*.wandb")
        assert settings_of(path)["strategies"]["verified"]["k"] == k
        assert any("test/geneval/verified" in row for row in history(path))
        assert all(row["verified"].is_file() for row in table(path, "test/images"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_multirun_in_the_comment_has_the_same_points(path: Path) -> None:
    sweep, fixed = sweep_of(path)
    comment = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    overrides = shlex.split(comment.partition("python train.py --multirun ")[2])
    assert overrides[: len(fixed)] == fixed
    grid = dict(item.split("=", 1) for item in overrides[len(fixed) :])
    assert grid.keys() == sweep["parameters"].keys()
    for key, space in sweep["parameters"].items():
        assert [type(value)(text) for value, text in zip(space["values"], grid[key].split(","), strict=True)] == space[
            "values"
        ]
