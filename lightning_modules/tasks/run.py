"""The tasks of `train.py`: one function each, over parts that are built once."""

import atexit
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoint import StopBetweenBatches, best_checkpoint, say_what_is_tested
from callbacks.runs import checkpoint_to_resume
from lightning_modules.backbone.checkpoint_folder import export_folders
from lightning_modules.backbone.loading import export as export_network
from lightning_modules.broken_files import first_line
from lightning_modules.evaluator import Evaluator
from lightning_modules.files import some_of, write_text
from lightning_modules.rewards.registry import JudgeRegistry
from lightning_modules.runs.checkpoints import (
    changed_settings,
    keep_metrics,
    load_checkpoint,
    named_checkpoints,
    read_checkpoint,
)
from lightning_modules.runs.mismatches import refuse_mismatches
from lightning_modules.runs.processes import about_load, is_first
from lightning_modules.runs.quiet import quieten
from lightning_modules.tasks.curve import CheckpointCurve

_launched_patience = 10.0  # seconds for launched processes to end after this one


def run(config: DictConfig) -> None:
    """Do the task of a config whose settings were checked.

    Raises ValueError, OSError or an error of Hydra's or OmegaConf's for what the user can mend.
    """
    global _launched_patience
    quieten()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.task == "fit":
        config.ckpt_path = checkpoint_to_resume(folder, config.ckpt_path, config.name)
    refuse_mismatches(config)
    seed_everything(config.seed, workers=True, verbose=False)
    if is_first():
        if not torch.cuda.is_available() and (said := about_load(torch.get_num_threads())):
            print(said, flush=True)
        if config.ckpt_path and (changed := changed_settings(folder, OmegaConf.to_container(config, resolve=True))):  # type: ignore[arg-type]
            print(f"It goes on with other settings: {some_of(changed)}", flush=True)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        keep_metrics(folder)
    try:
        TASKS[config.task](config)
    except MisconfigurationException as error:
        raise ValueError(first_line(error)) from error
    except SIGTERMException:  # a process that another one launched ends quietly, or Lightning would kill that one
        sys.exit(128 + signal.SIGTERM if is_first() else 0)
    _launched_patience = 600.0  # their work is done as well, and on a busy machine they need longer to end
    if config.logger.get("wandb"):
        import wandb

        wandb.finish()  # or the next job of a --multirun would log into this run


def build(node: DictConfig | None, **shared: Any) -> Any:
    """Instantiate a node, if any, with parts that are there already; containers are plain, dataclasses stay objects."""
    if node is None:
        return None
    if shared:
        return instantiate(node, _convert_="all", _partial_=True, **dict.fromkeys(shared))(**shared)
    return instantiate(node, _convert_="all")


def _refuse_other_kind(key: str, part: Any, kind: type) -> None:
    if not isinstance(part, kind):
        raise ValueError(f"{key} is no {kind.__name__}, but a {type(part).__name__}")


class Parts:
    """The parts of a run, each built once, when it is first asked for."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    @cached_property
    def module(self) -> Any:
        """The LightningModule, whose checkpoints keep the config."""
        plain = OmegaConf.to_container(self.config, resolve=True)  # before building resolves the config itself
        module: LightningModule = build(self.config.module)
        module.save_hyperparameters(plain)
        return module

    @cached_property
    def judges(self) -> JudgeRegistry:
        """All judges; the folder of images that task=score judges comes without a module."""
        networks = {} if self.config.task == "score" else dict(self.module.named_children())
        return build(self.config.judges, decoder=networks.get("decoder"), parm=networks.get("parm"))

    @cached_property
    def evaluator(self) -> Evaluator:
        return self.build(self.config.evaluator)

    @cached_property
    def callbacks(self) -> dict[str, Any]:
        built = {name: self.build(node) for name, node in self.config.callbacks.items() if node is not None}
        for name, callback in built.items():
            _refuse_other_kind(f"callbacks.{name}", callback, Callback)
        return built

    @cached_property
    def data(self) -> LightningDataModule | None:
        data = self.build(self.config.get("data"))
        if data is not None:
            _refuse_other_kind("data", data, LightningDataModule)
        return data

    @cached_property
    def trainer(self) -> Trainer:
        if "geneval" in self.callbacks:  # before loggers leave anything
            self.evaluator.refuse_unfit_strategies(self.module.decoder, training=self.config.task == "fit")
        return trainer_of(self.config, list(self.callbacks.values()))

    def build(self, node: DictConfig | None) -> Any:
        """Instantiate a node, whose `module`, `judges` and `evaluator` are those of the run."""
        shared = [key for key in ("module", "judges", "evaluator") if node is not None and key in node]
        return build(node, **{key: getattr(self, key) for key in shared})


def trainer_of(config: DictConfig, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Build the Trainer, with loggers that know the config."""
    trainer: Trainer = build(config.trainer, callbacks=[*callbacks, StopBetweenBatches()], logger=False)
    atexit.register(end_launched, trainer)
    strategy: Any = trainer.strategy
    several = trainer.world_size > 1 and not strategy.cluster_environment.creates_processes_externally
    if several and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("--multirun does not go with several processes a job: use a W&B sweep, or a torchrun for each")
    trainer.loggers = list(build(config.logger).values())  # which write: what the Trainer refuses leaves nothing behind
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(plain)
        except Exception as error:  # W&B has errors of its own for what the user can mend, such as no login
            raise ValueError(f"logger: {first_line(error)}") from error
    return trainer


def end_launched(trainer: Trainer) -> None:
    """Kill the processes that this one has launched and that do not end soon after it: they may wait for it in vain."""
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        try:
            process.wait(_launched_patience)
        except subprocess.TimeoutExpired:
            process.kill()


def fit(config: DictConfig) -> None:
    """Train, then test the weights that `test_ckpt_path` says."""
    parts = Parts(config)
    module, data, trainer = parts.module, parts.data, parts.trainer
    best = best_checkpoint(trainer) if config.test_ckpt_path == "best" else None
    done = read_checkpoint(config.ckpt_path).get("global_step") if config.ckpt_path else None
    rank_zero_only(print)("Stage 1 of 2: training", flush=True)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    if isinstance(trainer.strategy, FSDPStrategy):  # for good: another loop would shard what training has sharded
        return
    tested = best.best_model_path if best else None
    if tested == "":
        raise ValueError("test_ckpt_path=best: training ended before any weights were validated")
    rank_zero_only(print)("Stage 2 of 2: GenEval", flush=True)
    if trainer.global_step == done:
        said = f"Training had already ended, at step {trainer.global_step}: GenEval is measured again"
        rank_zero_only(print)(said, flush=True)
    say_what_is_tested(tested, f"the last weights (step {trainer.global_step})")
    trainer.test(module, data, ckpt_path=tested, verbose=False)


def evaluate(config: DictConfig) -> None:
    """Test a checkpoint, all of a folder, or the weights that the config names."""
    parts = Parts(config)
    if config.ckpt_path is not None and Path(config.ckpt_path).is_dir():
        geneval, checkpoints = parts.callbacks["geneval"], named_checkpoints(config.ckpt_path, config.task)
        evaluation = partial(geneval.evaluation, parts.module, testing=True)
        settings = config.scores_dir, geneval.run
        curve = CheckpointCurve(parts.module, parts.evaluator, evaluation, checkpoints, *settings)
        curve.run(trainer_of(config), Path(HydraConfig.get().runtime.output_dir))
        return
    trainer = parts.trainer  # what it refuses comes before what is said
    named = ("decoder.checkpoint", "parm.checkpoint")
    starts = [f"{key}={value}" for key in named if (value := OmegaConf.select(config, key)) is not None]
    listed = f" ({', '.join(starts)})" if starts else ""
    say_what_is_tested(config.ckpt_path, f"the weights of the config{listed}: there is no ckpt_path")
    trainer.test(parts.module, parts.data, ckpt_path=config.ckpt_path, verbose=False)


def rollout(config: DictConfig) -> None:
    """Make what the data needs, and train on nothing."""
    parts = Parts(config)
    parts.trainer.predict(parts.module, parts.data, ckpt_path=config.ckpt_path)


def generate(config: DictConfig) -> None:
    """Make a folder of images."""
    parts = Parts(config)
    generating = parts.build(config.generating)
    if config.ckpt_path is not None:
        load_checkpoint(parts.module, config.ckpt_path)
        trained, used = {*parts.module.exported}, {"decoder", *generating.strategy.judge_names}
        if trained and not trained & used:
            strategy = f"generating.strategy={config.generating.strategy}"
            said = f"ckpt_path changes no image: it trained {' and '.join(trained)}, and {strategy} does not ask it"
            rank_zero_only(print)(said, flush=True)
    generating.run(trainer_of(config))


def score(config: DictConfig) -> None:
    """Judge a folder of images."""
    Parts(config).build(config.scoring).run(trainer_of(config))


def export(config: DictConfig) -> None:
    """Write the networks that a checkpoint trained as weights of their own."""
    module = Parts(config).module
    load_checkpoint(module, config.ckpt_path)
    parts = module.exported
    folders = export_folders(config.export_dir, [*parts])
    for name, part in parts.items():
        node: Any = OmegaConf.to_container(config[name], resolve=True)
        export_network(part, folders[name], node)
        print(f"Exported {type(part).__name__} to {folders[name]}")


def pipeline(config: DictConfig) -> None:
    """Run jobs one after the other, and put them into one table."""
    build(config.pipeline).run()


TASKS = {task.__name__: task for task in (fit, evaluate, generate, score, rollout, export, pipeline)}
