"""Checks of the jobs of a pipeline, before the first of them runs: a wrong setting of the last is told at once."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_modules.broken_files import first_line
from lightning_modules.runs.checks import refuse_unread, refuse_wrong_values
from lightning_modules.runs.settings_tree import CONF

_BEFORE_TRAINING = "_before_training"  # ends the names of rows of untrained verifiers
# What a pipeline may be given; the folders are those of all runs, and its jobs use the usual ones.
_OF_PIPELINE = ("experiment", "task", "name", "pipeline", "rollouts_dir", "scores_dir")


def refuse_unread_by_jobs(overrides: Sequence[str]) -> None:
    """Raise ValueError for settings that the jobs of a pipeline do not get."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if re.split(r"[.@]", key)[0] not in _OF_PIPELINE:
            where = "pipeline.jobs.NAME.overrides holds what a job gets"
            raise ValueError(f"the jobs of task=pipeline do not read {key}: leave it out; {where}")


def refuse_unfit_jobs(pipeline: Mapping[str, Any]) -> None:
    """Raise ValueError for rows of jobs that there are not, and for jobs whose settings cannot be."""
    for title, row in pipeline["rows"].items():
        if row["job"] not in pipeline["jobs"]:
            there = ", ".join(pipeline["jobs"])
            raise ValueError(f"pipeline.rows: {title!r} names the job {row['job']!r}; there are: {there}")
    measured: dict[str, list[str]] = {}
    for name, job in pipeline["jobs"].items():
        if unknown := set(re.findall(r"<(\w+)>", " ".join(job["overrides"]))) - {*pipeline["jobs"]}:
            there = ", ".join(pipeline["jobs"])
            raise ValueError(f"pipeline.jobs.{name}.overrides names the job <{min(unknown)}>; there are: {there}")
        try:
            measured[name] = _measured(job["overrides"])
        except (ValueError, HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"pipeline.jobs.{name}.overrides: {first_line(error)}") from None
    for title, row in pipeline["rows"].items():
        if row["strategy"].removesuffix(_BEFORE_TRAINING) not in measured[row["job"]]:
            said = f"which the job {row['job']} does not measure: {', '.join(measured[row['job']])}"
            raise ValueError(f"pipeline.rows: {title!r} names the strategy {row['strategy']!r}, {said}")


def _measured(overrides: Sequence[str]) -> list[str]:
    """Return the strategies that a job measures; raises ValueError if its settings cannot be."""
    inside = GlobalHydra().is_initialized()  # of a run, which Hydra has started
    with nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*overrides])
    unresolved: Any = OmegaConf.to_container(config)
    refuse_unread(overrides, unresolved)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    refuse_wrong_values(plain, unresolved)
    measures = plain["callbacks"].get("geneval") or {"test_strategies": []}
    return [*(plain["strategies"] if measures["test_strategies"] is None else measures["test_strategies"])]
