"""Runs that are stopped at any moment and resumed end exactly where straight ones do."""

import csv
import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_modules.runs.checkpoints import newest_checkpoint, read_checkpoint, refuse_other_config, wandb_id
from tests.helpers.launch import launch, scontrol
from tests.helpers.overrides import SMALL_DPO, SMALL_GRPO, SMALL_PARM, TINY

EVERY_STEP = ["callbacks.checkpoint_last.every_n_train_steps=1"]
RUNS = {
    # Epochs of 3, then of 5 batches: verified rollouts join, made with the PARM of that moment.
    "parm": [*SMALL_PARM, "logger=default", "trainer.max_steps=8", "callbacks.geneval.every_n_epochs=2",
             "callbacks.geneval.test_strategies=[sample,verified_best_of_4]", "trainer.log_every_n_steps=1",
             *EVERY_STEP],
    # Epochs of different lengths: each has a new round of pairs.
    "dpo_iterative": [
        "experiment=dpo_iterative", *(item for item in SMALL_DPO if not item.startswith("strategies.")),
        "strategies=sample", "data.batch_size=2", "data.train.plain.samples=3", "trainer.max_epochs=2",
        "data.train.plain.per_round={two_object: 1, counting: 2, colors: 1, position: 1, color_attr: 1}",
        "module.warmup_steps=2", *EVERY_STEP,
    ],
    # Two epochs of two steps, each of two updates of two minibatches: a step's images are in the checkpoint.
    "grpo": ["experiment=grpo", *SMALL_GRPO, "data.batch_size=4", "trainer.accumulate_grad_batches=2", *EVERY_STEP],
}  # fmt: skip
STOPS = {
    "parm": [(2, signal.SIGKILL), (5, signal.SIGKILL), (6, signal.SIGTERM)],
    "dpo_iterative": [(2, signal.SIGKILL), (4, signal.SIGINT), (5, signal.SIGKILL)],
    "grpo": [(2, signal.SIGKILL), (3, signal.SIGTERM), (6, signal.SIGKILL)],
}


def started(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """train.py in a process of its own, in `folder`, which also chooses its run folder itself."""
    folder.mkdir(exist_ok=True)
    return launch([f"rollouts_dir={folder.parent}/rollouts", *overrides], folder, timeout=600)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only_run(folder: Path, name: str) -> Path:
    (run,) = (folder / "outputs" / name).iterdir()
    return run


@pytest.mark.slow(seconds=18)
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_in_the_weights_of_a_straight_one(tmp_path: Path, name: str) -> None:
    overrides = RUNS[name]
    done = started(tmp_path / "straight", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    for step, number in STOPS[name]:
        stop = f"+callbacks.stop={{_target_: tests.helpers.stopping.StopAt, step: {step}, signal: {int(number)}}}"
        done = started(tmp_path / "stopped", *overrides, "ckpt_path=auto", stop)
        ended = -signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM
        assert done.returncode == ended, done.stderr[-3000:]
        checkpoint = newest_checkpoint(only_run(tmp_path / "stopped", name))
        assert checkpoint is not None
        saved = read_checkpoint(str(checkpoint))["global_step"]
        assert number == signal.SIGKILL or (only_run(tmp_path / "stopped", name) / "curves.png").is_file()
        assert saved == step if number != signal.SIGKILL else 0 < saved < step  # asked to stop, it saves first
    (tmp_path / "rollouts").mkdir(exist_ok=True)  # GRPO leaves none: its images are in the checkpoint
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
        steps = [{row["step"] for path in run.glob("metrics*/metrics.csv") for row in read_rows(path)}
                 for run in (straight, stopped)]  # fmt: skip
        # A killed run keeps what it logged; one that is asked to stop saves its step before that is logged.
        assert steps[0] - steps[1] <= {"5"} and len(steps[0]) >= 8
        ids = {path.name.rpartition("-")[2] for path in stopped.glob("wandb/offline-run-*")}
        assert ids == {wandb_id(str(stopped))}
        # What a checkpoint holds: the trained part, and settings as plain data.
        assert {key.split(".")[0] for key in ends[0]["state_dict"]} == {"parm"}
        assert ends[0]["hyper_parameters"] == OmegaConf.to_container(OmegaConf.load(straight / "config.yaml"))


JOB = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
       "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
       "SLURM_NODELIST": "localhost"}  # fmt: skip


@pytest.mark.slow(seconds=12)
@pytest.mark.parametrize("dirs", [[], ["hydra.run.dir=fixed"]])
def test_a_requeued_job_resumes_and_tests_its_last_weights(tmp_path: Path, dirs: list[str]) -> None:
    small = [
        *SMALL_PARM,
        "callbacks.geneval.test_strategies=[sample,verified_best_of_4]",
        f"rollouts_dir={tmp_path}/rollouts",
    ]
    stop = f"{{_target_: tests.helpers.stopping.StopAt, step: 2, signal: {int(signal.SIGUSR1)}, killed: true}}"
    job = [*small, f"+callbacks.stop={stop}", *dirs]
    env = JOB | scontrol(tmp_path)
    assert launch(job, tmp_path, env).returncode == -signal.SIGKILL
    assert (tmp_path / "scontrol").read_text() == "requeue 4242\n"
    run = tmp_path / "fixed" if dirs else only_run(tmp_path, "parm")
    assert run.name == "fixed" or re.fullmatch(r"slurm-4242-[0-9a-f]{8}", run.name)
    stopped = newest_checkpoint(run)
    assert stopped is not None and read_checkpoint(str(stopped))["global_step"] == 2
    (run / "hpc_ckpt_1.ckpt").write_bytes(stopped.read_bytes())  # as Lightning itself leaves one
    done = launch(job, tmp_path, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Training had already ended" not in done.stdout
    assert (
        "Testing the last weights (step 5)" in done.stdout and f"Results in {run.relative_to(tmp_path)}" in done.stdout
    )
    assert dirs or only_run(tmp_path, "parm") == run
    assert newest_checkpoint(run) == run / "checkpoints" / "last.ckpt"

    straight = launch([*small, "hydra.run.dir=straight"], tmp_path)
    assert straight.returncode == 0, straight.stderr[-3000:]
    ends = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (tmp_path / "straight", run)]
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(ends[1][part], ends[0][part], rtol=0, atol=0)
    assert (run / "results.jsonl").read_bytes() == (tmp_path / "straight" / "results.jsonl").read_bytes()
    if dirs:
        again = launch([*small, "ckpt_path=auto", *dirs], tmp_path)
        said = "Training had already ended, at step 5: GenEval is measured again"
        assert said in again.stdout


@pytest.mark.parametrize(
    ("overrides", "task", "sentence"),
    [
        (["module.objective.clause_weight=0.25"], "fit", "module.objective.clause_weight=0.5, not 0.25"),
        (["seed=1"], "fit", "seed=0, not 1"),
        (["parm.module.transformer.dim=64"], "evaluate", "parm.module.transformer.dim=32, not 64"),
        (["decoder.checkpoint=elsewhere"], "evaluate", "decoder.checkpoint=null, not elsewhere"),
        (["+module.refit={_target_: mine}"], "export", "module.refit=null, not settings"),
        (["experiment=dpo", *TINY], "export", "module._target_=lightning_modules.parm.PARMModule, not lightning_"),
        (["trainer.max_steps=9", "evaluator.batch_size=4", "rollouts_dir=elsewhere"], "fit", ""),
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
    parts: Any = {"callbacks": {}, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    parts |= {"state_dict": {}, "global_step": 0, "pytorch-lightning_version": "2.5.0"}
    torch.save({"hyper_parameters": plain(), **parts}, path)
    if not sentence:
        refuse_other_config(path, plain(*overrides, f"task={task}"))
        return
    with pytest.raises(ValueError, match=r"ckpt_path: .*last\.ckpt was made with ") as refused:
        refuse_other_config(path, plain(*overrides, f"task={task}"))
    assert sentence in str(refused.value)
