"""Runs that are stopped at any moment and go on end exactly where straight ones do."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from callbacks.runs import newest_checkpoint, read_checkpoint, refuse_other_config, run_folder, wandb_id
from tests.conftest import TINY
from tests.launch import launch
from tests.test_train import SMALL_DPO, SMALL_PARM

EVERY_STEP = ["callbacks.checkpoint_last.every_n_train_steps=1"]
RUNS = {
    # Epochs of 3, then of 5 batches: verified rollouts join, made with the PARM of that moment.
    "parm": [*SMALL_PARM, "logger=default", "trainer.max_steps=8", "callbacks.geneval.every_n_epochs=2", *EVERY_STEP],
    # Epochs of different lengths: each has a new round of pairs.
    "dpo_iterative": [
        "experiment=dpo_iterative", *(item for item in SMALL_DPO if not item.startswith("strategies.")),
        "strategies=sample", "data.batch_size=2", "data.train.plain.samples=3", "trainer.max_epochs=2",
        "module.warmup_steps=2", *EVERY_STEP,
    ],
}  # fmt: skip
STOPS = {
    "parm": [(2, signal.SIGKILL), (5, signal.SIGKILL), (6, signal.SIGTERM)],
    "dpo_iterative": [(2, signal.SIGKILL), (4, signal.SIGINT), (5, signal.SIGKILL)],
}


def started(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """train.py in a process of its own, in `folder`, which also chooses its run folder itself."""
    folder.mkdir(exist_ok=True)
    return launch([f"rollouts_dir={folder.parent}/rollouts", *overrides], folder, timeout=600)


def only_run(folder: Path, name: str) -> Path:
    (run,) = (folder / "outputs" / name).iterdir()
    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_in_the_weights_of_a_straight_one(tmp_path: Path, name: str) -> None:
    overrides = RUNS[name]
    done = started(tmp_path / "straight", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    for step, number in STOPS[name]:
        stop = f"+callbacks.stop={{_target_: tests.stopping.StopAt, step: {step}, signal: {int(number)}}}"
        done = started(tmp_path / "stopped", *overrides, "ckpt_path=auto", stop)
        ended = -signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM
        assert done.returncode == ended, done.stderr[-3000:]
        checkpoint = newest_checkpoint(only_run(tmp_path / "stopped", name))
        assert checkpoint is not None
        saved = read_checkpoint(str(checkpoint))["global_step"]
        assert saved == step if number != signal.SIGKILL else 0 < saved < step  # asked to stop, it saves first
    (tmp_path / "rollouts").rename(tmp_path / "moved")  # what cannot be made again is found there by its name
    done = started(tmp_path / "stopped", *overrides, "ckpt_path=auto", f"rollouts_dir={tmp_path}/moved")
    assert done.returncode == 0, done.stderr[-3000:]
    straight, stopped = (only_run(tmp_path / folder, name) for folder in ("straight", "stopped"))
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (straight, stopped)]
    assert ends[0]["global_step"] == ends[1]["global_step"] and ends[0]["epoch"] == ends[1]["epoch"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(ends[1][part], ends[0][part], rtol=0, atol=0)
    reports = [json.loads((run / "geneval.json").read_text())["strategies"] for run in (straight, stopped)]
    for strategy, report in reports[0].items():
        assert reports[1][strategy]["tasks"] == report["tasks"]
    if name == "parm":
        assert [path.name for path in stopped.glob("metrics-*")] == ["metrics-1"]  # of the one that could save
        ids = {path.name.rpartition("-")[2] for path in stopped.glob("wandb/offline-run-*")}
        assert ids == {wandb_id(str(stopped))}
        # What a checkpoint holds: the trained part, and settings as plain data.
        assert {key.split(".")[0] for key in ends[0]["state_dict"]} == {"parm"}
        assert ends[0]["hyper_parameters"] == OmegaConf.to_container(OmegaConf.load(straight / "config.yaml"))


def test_a_run_goes_on_in_the_folder_of_the_newest_checkpoint(tmp_path: Path) -> None:
    parent = str(tmp_path / "parm")
    fresh = run_folder(parent, "fit", "auto")
    assert Path(fresh).parent == Path(parent)
    for number, name in enumerate(["b", "a", "c"]):
        checkpoints = tmp_path / "parm" / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        for step in (5, 10):
            path = checkpoints / f"step={step}.ckpt"
            path.touch()
            torch.save({"number": number}, path)
    (tmp_path / "parm" / "c" / "checkpoints" / "step=10.ckpt").rename(tmp_path / "elsewhere.ckpt")
    (tmp_path / "parm" / "c" / "checkpoints" / "last.ckpt").symlink_to("step=10.ckpt")  # killed before it was linked
    assert newest_checkpoint(tmp_path / "parm" / "c") == tmp_path / "parm" / "c" / "checkpoints" / "step=5.ckpt"
    assert run_folder(parent + "/", "fit", "auto") == f"{parent}/c"
    assert Path(run_folder(parent, "evaluate", "auto")).name not in "abc"


@pytest.mark.parametrize(
    ("overrides", "task", "sentence"),
    [
        (["module.objective.clause_weight=0.25"], "fit", "module.objective.clause_weight=0.5, not 0.25"),
        (["seed=1"], "fit", "seed=0, not 1"),
        (["parm.module.transformer.dim=64"], "evaluate", "parm.module.transformer.dim=32, not 64"),
        (["decoder.checkpoint=elsewhere"], "evaluate", "decoder.checkpoint=None, not elsewhere"),
        (["experiment=dpo", *TINY], "export", "module._target_=lightning_modules.parm.PARMModule, not lightning_"),
        (["trainer.max_steps=9", "callbacks.geneval.batch_size=4", "rollouts_dir=elsewhere"], "fit", ""),
        (["seed=1", "module.objective.clause_weight=0.25", "data.batch_size=3"], "evaluate", ""),
    ],
)
def test_a_checkpoint_of_another_config_names_the_key(
    tmp_path: Path, compose_config: Any, overrides: list[str], task: str, sentence: str
) -> None:
    def plain(*more: str) -> Any:
        config = compose_config(*TINY, *more)
        return OmegaConf.to_container(config, resolve=True)

    path = str(tmp_path / "last.ckpt")
    torch.save({"hyper_parameters": plain()}, path)
    if not sentence:
        refuse_other_config(path, plain(*overrides, f"task={task}"))
        return
    with pytest.raises(ValueError, match=r"ckpt_path: .*last\.ckpt was made with ") as refused:
        refuse_other_config(path, plain(*overrides, f"task={task}"))
    assert sentence in str(refused.value)


def test_what_is_no_checkpoint_of_plain_data_is_refused(tmp_path: Path) -> None:
    for content in (b"garbage", b""):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ckpt is no checkpoint of plain data"):
            read_checkpoint(str(tmp_path / "x.ckpt"))
    torch.save({"path": tmp_path}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt is no checkpoint of plain data"):
        read_checkpoint(str(tmp_path / "x.ckpt"))
