"""Compose the config, build the parts, call the Trainer. `python train.py --help` says what there is."""

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoint import StopBetweenBatches, best_checkpoint, say_what_is_tested
from callbacks.checks import refuse_missing_gpus, refuse_too_many_processes, refuse_unread, refuse_wrong_values
from callbacks.command_line import hydra_told, leave_tracebacks_to_the_user
from callbacks.curve import CheckpointCurve
from callbacks.geneval import GenEvalCallback
from callbacks.messages import MENDABLE, sentence
from callbacks.preflight import preflight
from callbacks.run_folder import checkpoint_to_resume
from callbacks.runs import (
    end_launched,
    forget_refused,
    keep_metrics,
    load_checkpoint,
    named_checkpoints,
    refuse_foreign,
    refuse_other_config,
)
from datamodules.preferences import PreferencesDataModule
from lightning_modules.backbone.loading import export, refuse_other_weights
from lightning_modules.broken_files import first_line
from lightning_modules.evaluation import EvaluationModule
from lightning_modules.files import write_text
from lightning_modules.parm import PARMModule

launched_patience = 10.0  # seconds for launched processes to end after this one; see `end_launched`
TASKS = ("fit", "evaluate", "generate", "score", "rollout", "export", "ladder")


def build(node: DictConfig | None, **more: Any) -> Any:
    """Instantiate a node with everything below it; plain containers, since dataclasses inside must stay objects."""
    return instantiate(node, _convert_="all", **more)


def trainer_for(config: DictConfig, callbacks: Sequence[Callback] = ()) -> Trainer:
    """The Trainer, with loggers that know the config."""
    trainer: Trainer = instantiate(config.trainer, callbacks=list(callbacks), logger=False)
    trainer.loggers = list(build(config.logger).values())  # which write: what the Trainer refuses leaves nothing behind
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
        except Exception as error:  # W&B has errors of its own for what the user can mend, such as no login
            raise ValueError(f"logger: {first_line(error)}") from error
    atexit.register(lambda: end_launched(trainer.strategy.launcher, launched_patience))
    if (
        HydraConfig.get().mode == RunMode.MULTIRUN
        and trainer.world_size > 1
        and not trainer.strategy.cluster_environment.creates_processes_externally  # type: ignore[attr-defined]
    ):
        raise ValueError("--multirun does not go with several processes a job: use a W&B sweep, or a torchrun for each")
    return trainer


def refuse_decoding(module: LightningModule, data: LightningDataModule, callbacks: dict[str, Callback]) -> None:
    """Raise ValueError for what decodes while it trains: sharded weights are together only in training steps."""
    if isinstance(module, PARMModule) or isinstance(data, PreferencesDataModule):
        raise ValueError(
            "trainer=fsdp trains on images (module=decoder) or on pairs from files (module=dpo data=preference_files); "
            "rollouts are for trainer=ddp, and what task=rollout makes of data=preferences can be such files"
        )
    scored = " ".join(
        f"~callbacks.{name}"
        for name, callback in callbacks.items()
        if isinstance(callback, GenEvalCallback) or getattr(callback, "monitor", None) == "val/geneval"
    )
    if scored:
        raise ValueError(f"trainer=fsdp cannot decode while it trains: add {scored}, and evaluate by trainer=ddp")


def run(config: DictConfig) -> None:
    """Do the task of a config."""
    written: Any = OmegaConf.to_container(config)  # building parts resolves interpolations in place
    hydra_config = HydraConfig.get()
    refuse_unread(hydra_config.overrides.task, written, hydra_config.runtime.choices)
    if config.task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {config.task!r}")
    if config.task == "ladder" and config.get("ladder") is None:
        raise ValueError("task=ladder needs jobs to run: use experiment=ladder")
    if config.task == "export" and config.ckpt_path is None:
        raise ValueError("task=export needs ckpt_path, the checkpoint to export")
    if config.task in ("fit", "rollout") and config.get("data") is None:
        raise ValueError(
            f"task={config.task} needs data, and here is none to train on; this config is for task=evaluate"
        )
    if config.task in ("score", "generate") and config.images is None:
        raise ValueError(f"task={config.task} needs images=DIR, the folder")
    used = ("scoring.", "geneval.reward.") if config.task == "score" else ("",)
    if missing := {key for key in OmegaConf.missing_keys(config) if key.startswith(used)}:
        raise ValueError(f"{min(missing)} needs a value")
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.test_ckpt_path not in (None, "best"):
        raise ValueError(f"test_ckpt_path must be null (the last weights) or best, not {config.test_ckpt_path!r}")
    if config.task == "fit":
        config.ckpt_path = checkpoint_to_resume(folder, config.ckpt_path, config.name)
    elif config.ckpt_path == "auto":
        raise ValueError(f"ckpt_path=auto is for task=fit; task={config.task} needs the path of a checkpoint")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    preset = hydra_config.runtime.choices.get("debug")
    hint = f"; +debug={preset} sets keys too, for the job that conf/debug/{preset}.yaml names" if preset else ""
    try:
        refuse_wrong_values(plain, written)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    if config.task == "ladder":
        build(config.ladder).run()
        return
    if config.task != "export":
        refuse_missing_gpus(plain["trainer"])
        refuse_too_many_processes(plain["trainer"])
    preflight(plain, written)
    checkpoints = named_checkpoints(config.ckpt_path, config.task) if config.ckpt_path is not None else []
    for path in checkpoints:
        refuse_other_config(path, plain)
    wandb = config.logger.get("wandb")
    if wandb and wandb.log_model and wandb.offline:
        raise ValueError("logger.wandb.log_model needs logger.wandb.offline=false: Lightning sends none offline")
    seed_everything(config.seed, workers=True, verbose=False)
    if rank_zero_only.rank == 0:
        refuse_foreign(folder)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        keep_metrics(folder)
    if config.task == "score":
        build(config.scoring).run(trainer_for(config, [StopBetweenBatches()]))
        return
    if config.task == "generate":
        generating = build(config.generating)
        if config.ckpt_path is not None:
            load_checkpoint(generating.module, config.ckpt_path)
        generating.run(trainer_for(config, [StopBetweenBatches()]))
        return
    module = build(config.module)
    if isinstance(module, EvaluationModule) and config.get("data") is not None:
        raise ValueError(f"module=evaluation has no use for data: add ~data{hint}")
    module.save_hyperparameters(plain)
    if config.task == "export":
        load_checkpoint(module, config.ckpt_path)
        parts = module.exported
        folders = {node: Path(config.export_dir) / (node if len(parts) > 1 else "") for node in parts}
        for node in parts:  # before any is written
            refuse_other_weights(folders[node], plain[node])
        for node, part in parts.items():
            export(part, folders[node], plain[node])
            print(f"Exported {type(part).__name__} to {folders[node]}")
        return
    callbacks = build(config.callbacks)
    if checkpoints and Path(config.ckpt_path).is_dir():
        if "geneval" not in callbacks:
            raise ValueError("task=evaluate of a folder needs callbacks.geneval, and here is none")
        curve = CheckpointCurve(module, callbacks["geneval"], checkpoints, config.scores_dir, folder)
        curve.run(trainer_for(config))
        return
    data = build(config.get("data"))
    trainer = trainer_for(config, list(callbacks.values()))
    sharded = isinstance(trainer.strategy, FSDPStrategy)
    if sharded:
        refuse_decoding(module, data, callbacks)
    if config.task == "fit":
        best = best_checkpoint(trainer) if config.test_ckpt_path == "best" else None
        trainer.fit(module, data, ckpt_path=config.ckpt_path)
        if sharded:  # for good: another loop would shard what training has sharded
            return
        tested = best and best.best_model_path
        if tested == "":
            raise ValueError("test_ckpt_path=best: training ended before any weights were validated")
        say_what_is_tested(tested, f"the last weights (step {trainer.global_step})")
        trainer.test(module, data, ckpt_path=tested, verbose=False)
    elif config.task == "rollout":
        trainer.predict(module, data, ckpt_path=config.ckpt_path)
    else:
        named = ("decoder.checkpoint", "parm.checkpoint")
        starts = [f"{key}={value}" for key in named if (value := OmegaConf.select(config, key)) is not None]
        say_what_is_tested(config.ckpt_path, f"the weights of the config ({', '.join(starts)}): there is no ckpt_path")
        trainer.test(module, data, ckpt_path=config.ckpt_path, verbose=False)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    global launched_patience
    leave_tracebacks_to_the_user()
    written: Any = OmegaConf.to_container(config)
    try:
        run(config)
        launched_patience = 600.0  # their work is done as well, and on a busy machine they need longer to end
    except MENDABLE as error:  # HYDRA_FULL_ERROR=1 shows where it came from
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        folder = HydraConfig.get().runtime.output_dir
        if rank_zero_only.rank == 0:
            forget_refused(Path(folder))
        sys.exit(f"Error: {sentence(error, written | {'hydra': {'run': {'dir': folder}}})}")
    except SIGTERMException:  # a process that another one launched ends quietly, or Lightning would kill that one
        sys.exit(128 + signal.SIGTERM if rank_zero_only.rank == 0 else 0)
    if config.logger.get("wandb"):
        import wandb

        wandb.finish()  # or the next job of a --multirun would log into this run


if __name__ == "__main__":
    with hydra_told(sys.argv[1:]):
        main()
