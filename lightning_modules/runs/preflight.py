"""All checks before anything heavy is imported: what a task lacks, choices that do not go together, missing files."""

import ast
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from datamodules.round_sizes import refuse_uneven_round
from lightning_modules.backbone.published import nodes
from lightning_modules.rewards.geneval_metadata import TASKS
from lightning_modules.runs.checkpoints import named_checkpoints, refuse_other_run, refuse_other_settings
from lightning_modules.runs.checks import (
    refuse_missing_devices,
    refuse_unknown_strategies,
    refuse_unread,
    refuse_wrong_values,
)
from lightning_modules.runs.data_files import refuse_broken_rows, refuse_unfit_images, refuse_unknown_words
from lightning_modules.runs.fitting import refuse_unfit_parts
from lightning_modules.runs.folders import refuse_unfit_folders
from lightning_modules.runs.judges import (
    refuse_same_names,
    refuse_teaching_judges,
    refuse_unknown_judges,
    refuse_unknown_options,
    refuse_unlabelled,
)
from lightning_modules.runs.messages import flat
from lightning_modules.runs.pipeline_jobs import refuse_unfit_jobs, refuse_unread_by_jobs
from lightning_modules.runs.settings_tree import CONF, options
from lightning_modules.runs.signatures import constant, lineage, locate
from lightning_modules.runs.weights import refuse_other_exports, refuse_unfit_weights

_GROUPS = "datamodules.online_groups.GroupsDataModule"
_ROLLOUTS = "datamodules.rollouts.RolloutsDataModule"


def refuse_settings(config: DictConfig) -> None:
    """Refuse a composed config that cannot work, before anything heavy is imported.

    Raises ValueError, naming the keys, or FileNotFoundError for a checkpoint.
    """
    unresolved: Any = OmegaConf.to_container(config)
    hydra = HydraConfig.get()
    refuse_unread(hydra.overrides.task, unresolved, hydra.runtime.choices)
    refuse_same_names(hydra.overrides.task)
    _refuse_incomplete(config, unresolved)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    preset = hydra.runtime.choices.get("debug")
    if config.task == "pipeline":
        refuse_unread_by_jobs(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        _refuse_several_processes(plain["trainer"])
    try:
        refuse_wrong_values(plain, unresolved)
        if config.task == "pipeline":  # what else its jobs need is checked in each
            refuse_unfit_jobs(plain["pipeline"])
            return
        if config.task != "export":
            refuse_missing_devices(plain["trainer"])
        _refuse_what_does_not_go_together(plain, unresolved)
        if config.task == "fit" and config.test_ckpt_path == "best" and not _keeps_best(plain["callbacks"]):
            raise ValueError("test_ckpt_path=best needs callbacks.checkpoint_best, and here is none")
        if config.task == "fit" and plain["trainer"].get("max_steps") == plain["trainer"].get("max_epochs") == -1:
            raise ValueError("trainer.max_steps and trainer.max_epochs are both -1: the learning rate needs an end")
        for key in ("max_steps", "max_epochs") if config.task == "fit" and config.test_ckpt_path == "best" else ():
            if plain["trainer"].get(key) == 0:
                raise ValueError(
                    f"trainer.{key}=0 trains nothing, and test_ckpt_path=best needs weights to choose from"
                )
    except ValueError as error:
        hint = _about_preset(preset, str(error), hydra.overrides.task) if preset else ""
        raise ValueError(f"{error}{hint}") from None
    if config.task not in ("score", "export"):
        refuse_broken_rows(plain)
    refuse_unfit_parts(plain, unresolved)
    if config.task in ("fit", "evaluate"):
        refuse_unknown_words(plain)
    refuse_unfit_weights(plain, unresolved)
    refuse_unfit_images(plain)
    refuse_unfit_folders(plain)
    if config.task == "export":
        refuse_other_exports(plain)
    if config.ckpt_path == "auto":
        refuse_other_run(Path(hydra.runtime.output_dir), plain)
    elif config.ckpt_path is not None:
        for path in named_checkpoints(config.ckpt_path, config.task):
            refuse_other_settings(path, plain)


def _about_preset(preset: str, sentence: str, overrides: Sequence[str]) -> str:
    """Say that a debug preset sets a key which a sentence names and the user did not type."""
    typed = {override.lstrip("+~").partition("=")[0] for override in overrides} | {"name"}
    given = {key for key, _ in flat(OmegaConf.to_container(OmegaConf.load(CONF / "debug" / f"{preset}.yaml")))}
    if not (given - typed) & {*re.findall(r"\w+(?:\.\w+)*", sentence)}:
        return ""
    others = [name for name in options("debug") if name.startswith("minutes_") and name != preset]
    jobs = [re.findall(r"experiment=\w+|data=\w+", (CONF / "debug" / f"{name}.yaml").read_text()) for name in others]
    listed = ", ".join(f"{' '.join(job)} +debug={name}" for name, job in zip(others, jobs, strict=True))
    shorten = f"; for others: {listed}" if preset.startswith("minutes") else ""
    return f"; +debug={preset} sets keys too, for the job that conf/debug/{preset}.yaml names{shorten}"


def _refuse_several_processes(trainer: Any) -> None:
    devices = str(trainer.get("devices")) if isinstance(trainer, Mapping) else ""
    launched = {"LOCAL_RANK", "SLURM_NTASKS"} & {*os.environ}  # each process by something else, which is fine
    if devices.isdecimal() and int(devices) > 1 and not launched:
        raise ValueError("--multirun does not go with several processes a job: use a W&B sweep, or a torchrun for each")


def _refuse_unknown_tasks(data: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers of prompts of a task that is none of GenEval's."""
    for key, node in nodes(data, "data"):
        counts = node.get("per_round")
        if unknown := [task for task in counts if task not in TASKS] if isinstance(counts, Mapping) else []:
            raise ValueError(f"{key}.per_round names the task {unknown[0]!r}; there are: {', '.join(TASKS)}")


def _refuse_other_distribution(module: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise ValueError for groups that are drawn otherwise than GRPO's ratios take them to be."""
    if data.get("_target_") != _GROUPS or (module.get("objective") or {}).get("ratio") == "likelihood":
        return
    for key, node in nodes(data["spec"]["strategy"], "data.spec.strategy"):
        if node["_target_"] == "lightning_modules.decoding.reflection.Reflection":
            raise ValueError(f"{key} decodes images anew in part: module.objective.ratio must be likelihood")
        if "sampling" in node and node["sampling"] != module.get("sampling"):
            said = "what is trained is the distribution that is sampled; only likelihood is learnt of others"
            raise ValueError(f"{key}.sampling differs from module.sampling: {said} (module.objective.ratio=likelihood)")


def _refuse_uneven_rounds(data: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Refuse minibatches that do not divide a round of groups, where the number of processes is known."""
    devices, machines = trainer.get("devices"), trainer.get("num_nodes", 1)
    if data.get("_target_") != _GROUPS or type(devices) is not int or devices < 1:
        return
    images, accumulated = _images_of_a_round(data["spec"]), trainer.get("accumulate_grad_batches", 1)
    refuse_uneven_round(images, data["batch_size"], devices * machines, data["inner_epochs"], accumulated)


def _images_of_a_round(spec: Mapping[str, Any]) -> int:
    return int(sum(spec["per_round"].values()) * spec["samples"])


def _refuse_rare_validation(data: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Raise ValueError if an epoch of images or rollouts, whose number is set, ends before the first validation."""
    interval, devices, size = trainer.get("val_check_interval"), trainer.get("devices"), data.get("batch_size")
    if not type(interval) is type(devices) is type(size) is int or trainer.get("check_val_every_n_epoch") is None:
        return
    images, said = data.get("train_images"), f"data.train_images={data.get('train_images')}"
    if data.get("_target_") == _GROUPS:
        images = data["rounds"] * data["inner_epochs"] * _images_of_a_round(data["spec"])
        said = f"data.rounds={data['rounds']}"
    if data.get("_target_") == _ROLLOUTS:
        first = [node for node in data["train"].values() if not node.get("from_epoch")]
        images = sum(node["samples"] * len(instantiate(node["prompts"], _convert_="all")) for node in first)
        said = f"the {images} rollouts of data.train"
    if images is not None and interval > (batches := -(-images // (size * abs(devices) * trainer.get("num_nodes", 1)))):
        given = f"{said} and data.batch_size={size}"
        raise ValueError(f"trainer.val_check_interval={interval} is more than the {batches} batches of {given}")


def _refuse_incomplete(config: DictConfig, unresolved: Mapping[str, Any]) -> None:
    task, tasks, tested = config.task, options("task"), config.test_ckpt_path
    jobs, data, auto = config.get("pipeline"), config.get("data"), config.ckpt_path == "auto"
    used = ("scoring.", "geneval.reward.", "fid.") if task == "score" else ("",)
    missing = min((key for key, value in flat(unresolved) if value == "???" and key.startswith(used)), default=None)
    without_data = f"task={task} needs data, and here is none to train on; this config is for task=evaluate"
    for applies, complaint in (
        (task not in tasks, f"task must be one of {', '.join(tasks)}, not {task!r}"),
        (task == "pipeline" and jobs is None, "task=pipeline needs jobs to run: use experiment=pipeline"),
        (task != "pipeline" and jobs is not None, f"experiment=pipeline is for task=pipeline, not for task={task}"),
        (task == "export" and config.ckpt_path is None, "task=export needs ckpt_path, the checkpoint to export"),
        (task in ("fit", "rollout") and "_target_" not in (data or {}), without_data),
        (task in ("score", "generate") and config.images is None, f"task={task} needs images=DIR, the folder"),
        (missing, f"{missing} needs a value"),
        (tested not in (None, "best"), f"test_ckpt_path must be null (the last weights) or best, not {tested!r}"),
        (auto and task != "fit", f"ckpt_path=auto is for task=fit; task={task} needs the path of a checkpoint"),
    ):
        if applies:
            raise ValueError(complaint)


def _refuse_what_does_not_go_together(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise ValueError for choices of which each is fine by itself."""
    module, data, callbacks = config["module"], config.get("data"), config["callbacks"]
    wandb, strategy = config["logger"].get("wandb"), config["trainer"].get("strategy")
    if wandb and wandb.get("log_model") and wandb.get("offline"):
        raise ValueError("logger.wandb.log_model needs logger.wandb.offline=false: Lightning sends none offline")
    if config["task"] != "export":
        refuse_unknown_options(config)
    if config["task"] == "score":
        refuse_unlabelled(config)
        refuse_unknown_judges(config)
    name = (config.get("generating") or {}).get("strategy")
    if config["task"] == "generate" and name not in config["strategies"]:
        raise ValueError(f"generating.strategy is {name!r}; there are: {', '.join(config['strategies'])}")
    if config["task"] in ("score", "generate", "export"):
        return
    folder = config["task"] == "evaluate" and config["ckpt_path"] and Path(config["ckpt_path"]).is_dir()
    if folder and "geneval" not in callbacks:
        raise ValueError("task=evaluate of a folder needs callbacks.geneval, and here is none")
    if callbacks.get("geneval"):
        refuse_unknown_strategies(callbacks["geneval"], config["strategies"], unresolved)
    refuse_unknown_judges(config)
    refuse_unlabelled(config)
    _refuse_unknown_tasks(data or {})
    for key, node in nodes(data or {}, "data") if config["task"] in ("fit", "rollout") else ():
        if node.get("prompts") == []:
            raise ValueError(f"{key}.prompts is empty: there is nothing to decode")
    if data:
        _refuse_other_data(module, data)
        if config["task"] == "fit":
            refuse_teaching_judges(config)
            _refuse_other_distribution(module, data)
            _refuse_uneven_rounds(data, config["trainer"])
            _refuse_rare_validation(data, config["trainer"])
    if config["task"] == "rollout" and not _says(data, "makes_rollouts", True):
        makes = "data=rollouts, preferences or preference_files"
        raise ValueError(f"task=rollout makes what {makes} needs before training; this data needs nothing")
    if config["task"] == "fit" and "geneval" not in callbacks and (waiting := _monitors_geneval(callbacks)):
        raise ValueError(f"without callbacks.geneval nothing measures val/geneval: add {_left_out(waiting)}")
    if not _is_sharded(strategy):
        return
    if not (_says(module, "trains_sharded", True) and _says(data, "trains_sharded", True)):
        said = "pairs from files (module=dpo data=preference_files), as task=rollout makes them of data=preferences"
        raise ValueError(f"devices=fsdp trains on images (module=decoder) or on {said}; rollouts are for devices=ddp")
    if decoding := [name for name in callbacks if name == "geneval" or name in _monitors_geneval(callbacks)]:
        advice = f"add {_left_out(decoding)}, and evaluate by devices=ddp"
        raise ValueError(f"devices=fsdp cannot decode while it trains: {advice}")


def _keeps_best(callbacks: Mapping[str, Any]) -> bool:
    nodes = [node for node in callbacks.values() if node and node.get("monitor")]
    return any(str(node["_target_"]).endswith("Checkpoint") for node in nodes)


def _monitors_geneval(callbacks: Mapping[str, Any]) -> list[str]:
    return [name for name, node in callbacks.items() if (node or {}).get("monitor") == "val/geneval"]


def _left_out(callbacks: Sequence[str]) -> str:
    return " ".join(f"~callbacks.{name}" for name in callbacks)


def _refuse_other_data(module: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    wanted = _says(module, "learns_from", "anything")
    given = _says(data, "gives", wanted)
    if wanted is None:
        raise ValueError("module=evaluation has no use for data: add ~data")
    if module.get("refit") and given == "pairs" and not _says(data, "has_labels", True):
        raise ValueError("module.refit needs pairs made from rollouts: images from files have no labels")
    if wanted == "pairs" != given:
        raise ValueError("module=dpo learns from pairs: use experiment=dpo, or data=preferences or preference_files")
    if wanted == "rollouts" and given == "pairs":
        raise ValueError("module=parm learns from rollouts, not from pairs: use data=rollouts, or module=dpo")
    if (wanted == "groups") != (given == "groups"):
        raise ValueError("module=grpo and data=groups go together: use experiment=grpo")
    for key, node in {"groups": {"spec": data.get("spec")}, "pairs": data.get("train") or {}}.get(given, {}).items():
        single = isinstance(node, Mapping) and node.get("samples") == 1
        if given == "groups" and (module.get("objective") or {}).get("baseline") == "none":
            continue  # rewards are the advantages
        if single and (given == "groups" or len(data["train"]) == 1):
            place = "data.spec" if given == "groups" else f"data.train.{key}"
            raise ValueError(f"{place}.samples must be at least 2: images of one prompt are compared")


def _says(node: Mapping[str, Any] | None, word: str, otherwise: Any) -> Any:
    """Return what the class of a node says of itself, or `otherwise` where there is none, or one that says nothing."""
    return constant(node["_target_"], word, otherwise) if node and "_target_" in node else otherwise


def _is_sharded(strategy: Any) -> bool:
    """Say if a strategy of the Trainer is FSDP, by its name or as a node."""
    if not isinstance(strategy, Mapping):
        return str(strategy).startswith("fsdp")
    found = locate(str(strategy.get("_target_")))
    classes = lineage(found) if found and isinstance(found.node, ast.ClassDef) else ()
    return any(getattr(each.node, "name", "") == "FSDPStrategy" for each in classes)
