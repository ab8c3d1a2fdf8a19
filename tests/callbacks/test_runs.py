"""Each run has a folder of its own, and finds it again when its SLURM job is requeued."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from callbacks.runs import checkpoint_to_resume, last_line, run_folder, try_to_hold
from lightning_modules.runs.checkpoints import newest_checkpoint, refuse_foreign
from lightning_modules.runs.slurm import run_id
from tests.helpers.launch import launch
from tests.helpers.overrides import SMALL_PARM

FORK = multiprocessing.get_context("fork")


def at_work(folder: Path) -> Any:
    """Another process that works in `folder` until it is killed."""
    begun = FORK.Event()

    def work() -> None:
        if try_to_hold(folder):
            begun.set()
            time.sleep(10_000)

    process = FORK.Process(target=work, daemon=True)
    process.start()
    assert begun.wait(60)
    return process


def save(folder: Path, name: str, step: int, run: str | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step, "slurm_run": run}, path)
    return path


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, compose_config: Callable[..., Any]) -> Callable[..., None]:
    """Puts this process into a SLURM job, with a command line."""

    def set_(job: str | None, *overrides: str, **variables: str) -> None:
        compose_config(*overrides)
        known = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", **variables}
        for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", *known):
            monkeypatch.delenv(key, raising=False)
        if job is not None:
            for key, value in {"SLURM_JOB_ID": job, **known}.items():
                monkeypatch.setenv(key, value)
        assert list(HydraConfig.get().overrides.task)[1:] == list(overrides)

    return set_


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = [run_folder(f"{tmp_path}/parm", "fit", None) for _ in range(3)]
    assert len(set(folders)) == 3 and all(Path(folder).is_dir() for folder in folders)


@pytest.mark.slow
def test_two_runs_are_never_at_work_in_one_folder(tmp_path: Path) -> None:
    other = at_work(tmp_path / "run")
    kept = save(tmp_path / "run", "checkpoints/last.ckpt", 3)
    for overrides in ([f"hydra.run.dir={tmp_path}/run"], ["--multirun", f"hydra.sweep.dir={tmp_path}/run"]):
        done = launch([*overrides, *SMALL_PARM], tmp_path)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"Error: another run is at work in {tmp_path}/run; give")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "checkpoints"]
    assert run_folder(str(tmp_path), "fit", "auto") != f"{tmp_path}/run"  # nor does it resume there
    other.kill()
    other.join()
    assert run_folder(str(tmp_path), "fit", "auto") == f"{tmp_path}/run" and kept.is_file()


@pytest.mark.slow
def test_what_does_not_run_leaves_no_folder(tmp_path: Path) -> None:
    for look in (["--help"], ["--cfg", "job"], ["--cfg", "all", "--resolve"]):
        assert launch(look, tmp_path).returncode == 0
    assert launch(["task=nothing"], tmp_path).returncode == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not list(tmp_path.glob("outputs/*/*"))


def test_a_run_resumes_in_the_folder_of_the_newest_checkpoint(tmp_path: Path) -> None:
    parent = str(tmp_path / "parm")
    assert Path(run_folder(parent, "fit", "auto")).parent == Path(parent)
    for name in "bac":
        for step in (5, 10):
            save(tmp_path / "parm" / name, f"checkpoints/step-{step}.ckpt", step)
    folder = tmp_path / "parm" / "c"
    (folder / "checkpoints" / "step-10.ckpt").rename(tmp_path / "elsewhere.ckpt")
    (folder / "checkpoints" / "last.ckpt").symlink_to("step-10.ckpt")  # killed before it was linked
    assert newest_checkpoint(folder) == folder / "checkpoints" / "step-5.ckpt"
    assert run_folder(parent + "/", "fit", "auto") == str(folder)
    assert Path(run_folder(parent, "evaluate", "auto")).name not in "abc"


def test_the_newest_checkpoint_has_most_steps_whatever_it_is_called(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    steps = [("checkpoints/step=9.ckpt", 9), ("checkpoints/step=10.ckpt", 10), ("checkpoints/step-11.ckpt", 11),
             ("hpc_ckpt_9.ckpt", 12), ("hpc_ckpt_10.ckpt", 13), ("checkpoints/last.ckpt", 13),
             ("checkpoints/step-14.ckpt", 14)]  # fmt: skip
    for name, step in steps:
        save(tmp_path, name, step)
        assert newest_checkpoint(tmp_path) == tmp_path / name
    os.utime(tmp_path / "checkpoints" / "step=9.ckpt")  # as a copy may have it
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-14.ckpt"


def test_a_command_of_a_slurm_job_is_a_run(tmp_path: Path, slurm: Callable[..., None]) -> None:
    parent = str(tmp_path)
    slurm("7", "seed=1")
    first = Path(run_folder(parent, "fit", None))
    assert first.name.startswith("slurm-7-") and run_folder(parent, "fit", "auto") == str(first)  # killed, requeued
    slurm("7", "seed=2")  # another command of the job
    assert run_folder(parent, "fit", None) not in (str(first), f"{first}-1")
    slurm("8", "seed=1")
    assert Path(run_folder(parent, "fit", None)).name == first.name.replace("-7-", "-8-")
    slurm("9", "seed=1", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert Path(run_folder(parent, "fit", None)).name == first.name.replace("-7-", "-7_3-")
    slurm("7", "seed=1", SLURM_JOB_NAME="interactive")
    assert not Path(run_folder(parent, "fit", None)).name.startswith("slurm")

    (first / ".ended").touch()  # the same command once more
    slurm("7", "seed=1")
    second = run_folder(parent, "fit", None)
    assert second == f"{first}-1"
    slurm("7", "seed=1", SLURM_RESTART_COUNT="1")  # the script begins again, with what had ended
    assert run_folder(parent, "fit", None) == str(first)

    slurm("7", "seed=3")
    third = tmp_path / f"slurm-{run_id()}"
    other = at_work(third)  # side by side
    assert run_folder(parent, "fit", None) == f"{third}-1"
    slurm("7", "seed=3", SLURM_NTASKS="2")  # here it may be the first of the tasks
    assert run_folder(parent, "fit", None) == str(third)
    other.kill()


def test_a_slurm_job_resumes_from_its_own_checkpoint_alone(tmp_path: Path, slurm: Callable[..., None]) -> None:
    slurm("7", "seed=1")
    save(tmp_path, "checkpoints/last.ckpt", 3, run_id())
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint_to_resume(tmp_path, None, "parm") == last
    assert checkpoint_to_resume(tmp_path, "start.ckpt", "parm") == last  # it has been there
    for job, seed in (("8", 1), ("7", 2), (None, 1)):
        slurm(job, f"seed={seed}")
        assert checkpoint_to_resume(tmp_path, None, "parm") is None
        assert checkpoint_to_resume(tmp_path, "start.ckpt", "parm") == "start.ckpt"
        assert checkpoint_to_resume(tmp_path, "auto", "parm") == last
    slurm("8", "seed=1")
    save(tmp_path, "hpc_ckpt_1.ckpt", 4)
    assert checkpoint_to_resume(tmp_path, None, "parm") == str(tmp_path / "hpc_ckpt_1.ckpt")


def test_the_last_line_repeats_what_counted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    line = last_line(tmp_path, ["seed=1", "task=fit", "name='a b'", "seed=2"], "last")
    assert line.endswith("checkpoints/last.ckpt") and last_line(tmp_path, [], "best").endswith("checkpoints/best.ckpt")
    assert "python train.py seed=2 'name='" in line and "seed=1" not in line and "task=fit" not in line


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "rollouts").mkdir(parents=True)
    for name in (".hidden", "slurm-1.out", "log.txt"):
        (folder / name).touch()
    config = {"rollouts_dir": str(folder / "rollouts")}
    refuse_foreign(folder, config)
    refuse_foreign(tmp_path / "nothing", config)
    for name in ("b.md", "a.md", "d.md", "c.md"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"^hydra\.run\.dir: .*docs holds a\.md, b\.md, c\.md and 1 more of something"):
        refuse_foreign(folder, config)
    (folder / "config.yaml").write_text("rollouts_dir: x\n")  # of a run
    refuse_foreign(folder, config)
