"""All checks of a config, before anything is built: what a task lacks, and parts that do not go together."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_modules.artifacts import refuse_unmarked
from lightning_modules.backbone.published import Published, clip_named, named, nodes, refuse_missing
from lightning_modules.rewards.open_clip_loader import refuse_other_network
from lightning_modules.runs.checkpoints import named_checkpoints, refuse_foreign, refuse_other_config
from lightning_modules.runs.checks import (
    refuse_missing_gpus,
    refuse_too_many_processes,
    refuse_unread,
    refuse_wrong_values,
)
from lightning_modules.runs.messages import written_at

TASKS = ("fit", "evaluate", "generate", "score", "rollout", "export", "pipeline")
# What a task builds.
_BUILT = {"score": ("scoring",), "generate": ("generating",), "export": ("module",)}


def preflight(config: DictConfig) -> None:
    """Refuse a config that cannot work, before anything is built or loaded.

    Args:
        config: composed, with its interpolations, which say under which keys users set what many parts read.

    Raises:
        ValueError: a key that nothing reads, a value or a combination that cannot work; the sentence names the keys.
        FileNotFoundError: weights or checkpoints are missing, all of which are named; or a file of CLIP's is none.
    """
    written: Any = OmegaConf.to_container(config)
    hydra = HydraConfig.get()
    refuse_unread(hydra.overrides.task, written, hydra.runtime.choices)
    _refuse_incomplete(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    preset = hydra.runtime.choices.get("debug")
    try:
        refuse_wrong_values(plain, written)
        if config.task == "pipeline":  # its jobs are checked each on its own
            return
        if config.task != "export":
            refuse_missing_gpus(plain["trainer"])
            refuse_too_many_processes(plain["trainer"])
        _refuse_what_does_not_go_together(plain)
    except ValueError as error:
        hint = f"; +debug={preset} sets keys too, for the job that conf/debug/{preset}.yaml names" if preset else ""
        raise ValueError(f"{error}{hint}") from None
    _refuse_mismatched_parts(plain, written)
    if config.ckpt_path is not None:
        for path in named_checkpoints(config.ckpt_path, config.task):
            refuse_other_config(path, plain)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        refuse_foreign(Path(hydra.runtime.output_dir))


def _is_sharded(config: Mapping[str, Any]) -> bool:
    """Whether the Trainer splits weights between processes; they are together only in training steps."""
    strategy = config["trainer"].get("strategy")
    if isinstance(strategy, Mapping):
        return issubclass(get_class(strategy["_target_"]), FSDPStrategy)
    return str(strategy).startswith("fsdp")


def _refuse_incomplete(config: DictConfig) -> None:
    """Raise ValueError where the task lacks a setting that it needs."""
    task, ckpt_path = config.task, config.ckpt_path
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    if task == "pipeline" and config.get("pipeline") is None:
        raise ValueError("task=pipeline needs jobs to run: use experiment=pipeline")
    if task == "export" and ckpt_path is None:
        raise ValueError("task=export needs ckpt_path, the checkpoint to export")
    if task in ("fit", "rollout") and config.get("data") is None:
        raise ValueError(f"task={task} needs data, and here is none to train on; this config is for task=evaluate")
    if task in ("score", "generate") and config.images is None:
        raise ValueError(f"task={task} needs images=DIR, the folder")
    used = ("scoring.", "geneval.reward.") if task == "score" else ("",)
    if missing := {key for key in OmegaConf.missing_keys(config) if key.startswith(used)}:
        raise ValueError(f"{min(missing)} needs a value")
    if config.test_ckpt_path not in (None, "best"):
        raise ValueError(f"test_ckpt_path must be null (the last weights) or best, not {config.test_ckpt_path!r}")
    if ckpt_path == "auto":
        raise ValueError(f"ckpt_path=auto is for task=fit; task={task} needs the path of a checkpoint")


def _refuse_what_does_not_go_together(config: Mapping[str, Any]) -> None:
    """Raise ValueError for choices of which each is fine by itself."""
    module, data, callbacks = config["module"], config.get("data"), config["callbacks"]
    wandb = config["logger"].get("wandb")
    if wandb and wandb.get("log_model") and wandb.get("offline"):
        raise ValueError("logger.wandb.log_model needs logger.wandb.offline=false: Lightning sends none offline")
    if config["task"] in _BUILT:
        return
    folder = config["task"] == "evaluate" and config["ckpt_path"] and Path(config["ckpt_path"]).is_dir()
    if folder and "geneval" not in callbacks:
        raise ValueError("task=evaluate of a folder needs callbacks.geneval, and here is none")
    if data:
        _refuse_other_data(module, data)
    if not _is_sharded(config):
        return
    if not (_says(module, "trains_sharded", True) and _says(data, "trains_sharded", True)):
        raise ValueError(
            "devices=fsdp trains on images (module=decoder) or on pairs from files (module=dpo data=preference_files); "
            "rollouts are for devices=ddp, and what task=rollout makes of data=preferences can be such files"
        )
    decoding = [
        name for name, node in callbacks.items() if name == "geneval" or (node or {}).get("monitor") == "val/geneval"
    ]
    if decoding:
        removed = " ".join(f"~callbacks.{name}" for name in decoding)
        raise ValueError(f"devices=fsdp cannot decode while it trains: add {removed}, and evaluate by devices=ddp")


def _refuse_other_data(module: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise ValueError for data that the module does not learn from."""
    wanted = _says(module, "learns_from", None)
    given = _says(data, "gives", wanted)
    if "learns_from" in dir(get_class(module["_target_"])) and wanted is None:
        raise ValueError("module=evaluation has no use for data: add ~data")
    if wanted == "pairs" != given:
        raise ValueError("module=dpo learns from pairs: use experiment=dpo, or data=preferences or preference_files")
    if wanted == "rollouts" and given == "pairs":
        raise ValueError("module=parm learns from rollouts, not from pairs: use data=rollouts, or module=dpo")


def _says(node: Mapping[str, Any] | None, word: str, otherwise: Any) -> Any:
    """Give what the class of a node says of itself, or `otherwise` where there is none, or one that says nothing."""
    return otherwise if node is None else getattr(get_class(node["_target_"]), word, otherwise)


def _refuse_mismatched_parts(config: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Raise for networks, images, detectors and prompts that differ in size or words, and for missing weights."""
    if config["task"] == "generate":
        try:
            refuse_unmarked(Path(config["images"]))
        except ValueError as error:
            raise ValueError(f"{error}; task=score judges what is there") from None
    parts = _BUILT.get(config["task"], ("module", "callbacks", "data"))
    built = {name: config[name] for name in parts if config.get(name)}
    if config["task"] != "score":
        _refuse_mismatched_networks(config, written, built)
    for _, detector in _detectors(built):
        if names := getattr(detector, "class_names", None):
            _refuse_unknown_classes(config, names)
            break
    for key, node in nodes(built):
        if clip := clip_named(node):
            refuse_other_network(written_at(written, key), *clip)
    weights: dict[str, Published] = {}
    for each in named(built):
        key = written_at(written, each.key)
        weights[key] = replace(each, key=key)
    refuse_missing(list(weights.values()))


def _refuse_mismatched_networks(
    config: Mapping[str, Any], written: Mapping[str, Any], built: Mapping[str, Any]
) -> None:
    """Compare the sizes of decoder, PARM, images and detector; nothing is loaded."""
    parm = built.get("module", {}).get("parm")
    decoder, tokenizer = (config.get(name) for name in ("decoder", "tokenizer"))
    grid, side = None, (config.get("sampling") or {}).get("size")
    if tokenizer:
        with torch.device("meta"):
            network = instantiate(tokenizer["module"], _convert_="all")
        grid, side = network.grid, network.image_size
    if parm and decoder:
        reads, shows = parm["module"], decoder["module"]
        for name, meaning, value in (
            ("feature_layers", "decoder.module.feature_layers", shows.get("feature_layers")),
            ("decoder_dim", "the width of the decoder", shows.get("dim", shows.get("transformer", {}).get("dim"))),
            ("grid", "the grid of the image tokenizer", grid),
        ):
            if reads[name] != value:
                raise ValueError(f"parm.module.{name}={reads[name]} does not go with {meaning}, which is {value}")
    if "train_images" in (data := built.get("data", {})):
        height, width = instantiate(data["train"], _convert_="all")[0].image.shape[:2]
        if tokenizer and (height, width) != (side, side):
            raise ValueError(
                f"data.train gives images of {width}x{height} pixels, and the image tokenizer reads {side}x{side}: "
                "point data.train._target_ and data.validation._target_ at images of that size"
            )
    for key, detector in _detectors(built):
        wanted = getattr(detector, "image_size", None)
        if side and wanted and wanted != side:
            raise ValueError(
                f"{written_at(written, key)}: {detector.__name__} looks at images of {wanted}x{wanted} pixels, and the "
                f"decoder makes {side}x{side}; geneval=coco judges photographs of any size"
            )


def _detectors(config: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """The classes of the detectors in a config, with their keys."""
    for key, node in nodes(config):
        if key.split(".")[-1] == "detector":
            yield key, get_class(node["_target_"])


def _refuse_unknown_classes(config: Mapping[str, Any], class_names: tuple[str, ...]) -> None:
    for name in ("train_prompts", "validation_prompts", "test_prompts"):
        node = config["geneval"].get(name)
        for row in instantiate(node, _convert_="all") if node else ():
            for clause in (*row["include"], *row.get("exclude", ())):
                if clause["class"] not in class_names:
                    known = ", ".join(class_names)
                    raise ValueError(
                        f"geneval.{name}: {row['prompt']!r} asks for {clause['class']!r}, which "
                        f"geneval.reward.detector does not know; it knows: {known}"
                    )
