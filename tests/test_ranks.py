"""Runs of two processes: the same images, rows and weights as of one, and an end when one of them fails."""

import csv
import json
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed.run
from hydra.utils import instantiate

from lightning_modules.backbone.decoder import TokenDecoder
from tests.helpers.launch import TRAIN, Start, command, free_port, launch, launch_together, scontrol
from tests.helpers.models import make_decoder, make_masked
from tests.helpers.overrides import (
    DECODE_NOTHING,
    SHARDED,
    SMALL,
    SMALL_DPO,
    SMALL_GRPO,
    SMALL_PARM,
    TINY_SHOWO,
    here,
    pair_files,
)

TORCHRUN = str(torch.distributed.run.__file__)
# 20 steps on an even number of rows, so that no rank repeats one; half of a batch each. Weights whose true gradient is
# zero get rounding errors alone, which Adam would blow up to steps of full size: epsilon holds them down.
STEPS = ["trainer.max_steps=20", "+module.optimizer.eps=1e-3", "callbacks.checkpoint_last.every_n_train_steps=1",
         "callbacks.checkpoint_last.save_top_k=-1", "callbacks.geneval.every_n_epochs=100",
         "callbacks.geneval.test_strategies=[sample]"]  # fmt: skip
TRAINING = {
    "parm": [*SMALL_PARM, *STEPS, "data.train.verified.from_epoch=100", "module.optimizer.lr=1e-3",
             "module.warmup_steps=2"],
    "dpo": ["experiment=dpo", *SMALL_DPO, *STEPS, "trainer.max_epochs=-1", "trainer.val_check_interval=1.0",
            "module.warmup_steps=2", "callbacks.early_stop.patience=100", "data.train.plain.samples=5"],
    "grpo": ["experiment=grpo", *SMALL_GRPO, *STEPS, "trainer.max_epochs=-1", "trainer.accumulate_grad_batches=1",
             "data.rounds=10", "module.objective.beta=0.1"],
}  # fmt: skip


@pytest.mark.slow(seconds=36)
@pytest.mark.parametrize("name", TRAINING)
def test_two_ranks_take_the_steps_of_one_with_twice_the_batch(tmp_path: Path, name: str) -> None:
    command(tmp_path, *TRAINING[name], "data.batch_size=8")
    command(tmp_path, *TRAINING[name], "data.batch_size=4", "devices=ddp_cpu", f"hydra.run.dir={tmp_path}/two")
    one, two = (
        {path.name: torch.load(path, weights_only=True)["state_dict"] for path in folder.glob("checkpoints/step-*")}
        for folder in (tmp_path / "run", tmp_path / "two")
    )
    assert one.keys() == two.keys() and "step-20.ckpt" in one and len(one) >= 10
    start, end = one["step-1.ckpt"], one["step-20.ckpt"]
    assert max((end[key] - start[key]).abs().max() for key in start) > 1e-4  # they do learn
    for step, weights in one.items():
        for key, value in weights.items():
            torch.testing.assert_close(two[step][key], value, rtol=0, atol=1e-5)


@pytest.mark.slow(seconds=15)
def test_two_ranks_collect_the_rollouts_of_one(tmp_path: Path) -> None:
    common = [*SMALL_PARM, "task=rollout", "data.collect_batch_size=5"]
    command(tmp_path, *common)
    done = command(tmp_path, *common, "devices=ddp_cpu", f"rollouts_dir={tmp_path}/two")
    assert "plain: 24 rollouts, 0." in done.stdout + done.stderr
    folders = sorted(path.relative_to(tmp_path / "rollouts") for path in (tmp_path / "rollouts").glob("*/part-*"))
    assert folders and folders == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").glob("*/part-*")
    )
    for part in folders:
        one, two = (datasets.load_from_disk(str(tmp_path / root / part)) for root in ("rollouts", "two"))
        assert one["tokens"][:] == two["tokens"][:] and one["reward"][:] == two["reward"][:]


@pytest.mark.slow(seconds=25)
def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path: Path) -> None:
    """Whether the other one waits for it or does not notice; jobs side by side, since much of this is waiting."""
    failures = [(0, False, True), (1, False, False), (1, True, True)]  # rank, killed, busy
    starts = []
    for number, (rank, killed, busy) in enumerate(failures):
        fail = f"{{_target_: tests.helpers.stopping.FailOn, rank: {rank}, killed: {killed}, busy: {busy}}}"
        places = [f"hydra.run.dir={tmp_path}/{number}", f"rollouts_dir={tmp_path}/rollouts"]
        starts.append(Start([*SMALL_PARM, "devices=ddp_cpu", f"+callbacks.fail={fail}", *places]))
    for (rank, killed, _), done in zip(failures, launch_together(starts, tmp_path), strict=True):
        assert done.returncode != 0
        assert killed or f"rank {rank} has run out of paint" in done.stderr


@pytest.mark.slow(seconds=20)
def test_two_ranks_that_evaluate_stop_when_the_first_is_asked_to(tmp_path: Path) -> None:
    def stop(process: int) -> None:
        end = time.monotonic() + 100
        while not list(tmp_path.glob("scores/unfinished-*/*.pt")) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(process, signal.SIGTERM)

    line = [*SMALL, "task=evaluate", "module=evaluation", "~data", "devices=ddp_cpu", "evaluator.batch_size=1",
            "geneval.test_prompts.per_task=50", f"scores_dir={tmp_path}/scores"]  # fmt: skip
    (done,) = launch_together([Start(line)], tmp_path, 120, stop)
    assert done.returncode == 128 + signal.SIGTERM, done
    assert "The evaluation stops; the same command resumes it" in done.stdout + done.stderr


def slurm(node: int, port: int) -> dict[str, str]:
    """What srun tells the process on the first or second of two machines."""
    task = {"NTASKS": 2, "NTASKS_PER_NODE": 1, "PROCID": node, "LOCALID": 0, "NODEID": node, "NNODES": 2,
            "JOB_ID": 7, "STEP_ID": 0, "JOB_NAME": "train", "NODELIST": "localhost"}  # fmt: skip
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return address | {f"SLURM_{key}": str(value) for key, value in task.items()}


@pytest.mark.slow(seconds=20)
def test_two_tasks_of_a_requeued_job_stop_together_and_resume_exactly(tmp_path: Path) -> None:
    small = [*SMALL_PARM, "devices=ddp_cpu", "data.batch_size=4", "trainer.max_steps=4",
             "callbacks.geneval.test_strategies=[sample]"]  # fmt: skip
    command(tmp_path, *small)
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()  # both know the score that is monitored
    stop = f"+callbacks.stop={{_target_: tests.helpers.stopping.StopAt, step: 2, signal: {int(signal.SIGUSR1)}}}"
    line = [f"rollouts_dir={tmp_path}/rollouts", *small, stop, "trainer.num_nodes=2", "trainer.devices=1"]
    for start, step, codes in ((0, 2, [128 + signal.SIGTERM, 0]), (1, 4, [0, 0])):
        env, port = scontrol(tmp_path) | {"SLURM_RESTART_COUNT": str(start)}, free_port()
        done = launch_together([Start(line, env | slurm(node, port)) for node in (0, 1)], tmp_path)
        assert [process.returncode for process in done] == codes, done
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
        (run,) = (tmp_path / "outputs" / "parm").iterdir()
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    assert "Testing the last weights (step 4)" in done[0].stdout and "Testing" not in done[1].stdout
    ends = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (tmp_path / "run", run)]
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(ends[1][part], ends[0][part], rtol=0, atol=0)


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("launcher", ["own", "torchrun", "torchrun_nodes", "slurm_nodes"])
def test_all_processes_share_one_folder_and_one_wandb_run(tmp_path: Path, launcher: str) -> None:
    small = [*SMALL_PARM, "logger=default", "task=evaluate", "devices=ddp_cpu",
             "callbacks.geneval.test_strategies=[sample]"]  # fmt: skip
    line = [f"rollouts_dir={tmp_path}/rollouts", *small]
    port = free_port()
    if launcher.endswith("nodes"):
        line += ["trainer.num_nodes=2", "trainer.devices=1"]
    nodes = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    options = {
        "torchrun": [["--nproc-per-node=2", f"--master-port={port}"]],
        "torchrun_nodes": [[*nodes, f"--node-rank={node}"] for node in (0, 1)],
    }
    if launcher in options:  # whose processes are real ones
        starts = [Start([*each, str(TRAIN), *line], script=TORCHRUN) for each in options[launcher]]
    else:
        starts = [Start(line)] if launcher == "own" else [Start(line, slurm(node, port)) for node in (0, 1)]
    for done in launch_together(starts, tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "outputs" / "parm").iterdir()
    assert launcher != "slurm_nodes" or re.fullmatch(r"slurm-7-[0-9a-f]{8}", run.name)
    assert (run / "geneval.json").is_file() and (run / "config.yaml").is_file()
    assert len(list(tmp_path.rglob("run-*.wandb"))) == 1
    rows = [json.loads(row) for row in (run / "results.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["filename"] for row in rows}) == 6  # each image by one of the two


@pytest.mark.slow
def test_multirun_of_several_processes_is_refused(tmp_path: Path) -> None:
    done = launch(["--multirun", *SMALL_PARM, "devices=ddp_cpu", "seed=0,1"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: --multirun does not go with several processes a job")


def test_processes_wait_for_a_long_evaluation(compose_config: Any) -> None:
    for choice in ("ddp", "ddp_cpu", "fsdp"):
        assert instantiate(compose_config(f"devices={choice}").trainer.strategy)._timeout >= timedelta(hours=24)


@pytest.mark.parametrize("decoder", [make_decoder(), make_masked()], ids=["next_token", "mask_token"])
def test_layers_are_what_is_sharded(compose_config: Any, decoder: TokenDecoder) -> None:
    policy = instantiate(compose_config("devices=fsdp").trainer.strategy).kwargs["auto_wrap_policy"]
    sharded = [name for name, module in decoder.named_modules() if policy(module, recurse=False, nonwrapped_numel=0)]
    assert [name for name in sharded if name.startswith("transformer.")] == [
        f"transformer.blocks.{i}" for i in range(3)
    ]


# Pairs from files, for a few steps of more than rounding errors; see STEPS.
ALIGNED = [*DECODE_NOTHING, "trainer.max_epochs=-1", "trainer.precision=32-true", "trainer.gradient_clip_val=null",
           "+module.optimizer.eps=1e-3", "module.optimizer.lr=1e-3", "module.warmup_steps=1",
           "callbacks.checkpoint_last.every_n_train_steps=1", "trainer.log_every_n_steps=1"]  # fmt: skip


def assert_same_weights(folder: Path) -> None:
    """Assert that the runs `run` and `sharded` in a folder have come to the same weights by three steps."""
    one, two = (
        torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("run", "sharded")
    )
    assert one["global_step"] == two["global_step"] == 3
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=1e-5)


@pytest.mark.slow(seconds=22)
def test_sharded_ranks_take_the_steps_of_one_process_and_resume(tmp_path: Path) -> None:
    small = ["experiment=shapes_decoder", *(item for item in SMALL if not item.startswith("callbacks")),
             "~callbacks.geneval", "~callbacks.checkpoint_best", "callbacks.checkpoint_last.every_n_train_steps=1",
             "data.validation_images=8", "data.num_workers=0", "trainer.max_steps=3", "+module.optimizer.eps=1e-3",
             "trainer.gradient_clip_val=null", "module.warmup_steps=2"]  # fmt: skip
    command(tmp_path, *small, "data.batch_size=8", "trainer.precision=32-true")
    small += [*SHARDED, "data.batch_size=4", f"hydra.run.dir={tmp_path}/sharded", "ckpt_path=auto"]
    command(tmp_path, *small)
    assert_same_weights(tmp_path)
    # On the CPU, torch's FSDP saves the first moment of Adam as its second one too: there are no weights to compare.
    command(tmp_path, *small, "trainer.max_steps=4")
    last = tmp_path / "sharded" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4


@pytest.mark.slow(seconds=37)
def test_sharded_show_o_is_aligned_as_by_one_process_and_resumes(tmp_path: Path) -> None:
    small = ["experiment=showo_dpo", *TINY_SHOWO, *pair_files(tmp_path, 256), *ALIGNED]
    command(tmp_path, *small, "data.batch_size=4")
    small += [*SHARDED, "data.batch_size=2", f"hydra.run.dir={tmp_path}/sharded", "ckpt_path=auto"]
    command(tmp_path, *small)
    assert_same_weights(tmp_path)
    for key in ("train/grad_norm", "val/loss"):
        one, two = (columns(tmp_path / name / "metrics" / "metrics.csv")[key] for name in ("run", "sharded"))
        assert one and two == pytest.approx(one, rel=1e-4)
    command(tmp_path, *small, "trainer.max_steps=4")
    last = tmp_path / "sharded" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("lora", ["null", "{_target_: lightning_modules.backbone.lora.LoRA}"], ids=["all", "adapters"])
def test_sharded_janus_is_aligned_as_by_one_process(tmp_path: Path, lora: str) -> None:
    """Layers computed again in the backward pass, prompts of several lengths; both runs side by side."""
    small = ["experiment=janus_dpo", "+debug=tiny_janus", *pair_files(tmp_path, 144), *ALIGNED, *here(tmp_path)]
    small.append(f"for_dpo.lora={lora}")
    sharded = [*small, *SHARDED, "data.batch_size=2", f"hydra.run.dir={tmp_path}/sharded"]
    for done in launch_together([Start([*small, "data.batch_size=4"]), Start(sharded)], tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path)


def columns(path: Path) -> dict[str, list[float]]:
    """The numbers of each column of a CSV file, without empty ones."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}
