"""All checks of a config, before anything is built: what a task lacks, and parts that do not go together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.strategies import FSDPStrategy
from omegaconf import DictConfig, OmegaConf

from lightning_modules.artifacts import refuse_unmarked
from lightning_modules.backbone.published import clip_named, named, nodes, refuse_missing
from lightning_modules.ranks import is_first
from lightning_modules.rewards.open_clip_loader import refuse_other_network
from lightning_modules.runs.checkpoints import named_checkpoints, refuse_foreign, refuse_other_config
from lightning_modules.runs.checks import refuse_missing_devices, refuse_unread, refuse_wrong_values
from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.settings_tree import options

# What is built by tasks that need no module, callbacks and data.
_BUILT = {"score": ("scoring",), "generate": ("generating",), "export": ("module",)}


def preflight(config: DictConfig) -> None:
    """Refuse a composed config that cannot work, before anything is built or loaded.

    Raises ValueError, naming the keys, or FileNotFoundError, naming all weights that are missing.
    """
    unresolved: Any = OmegaConf.to_container(config)
    hydra = HydraConfig.get()
    refuse_unread(hydra.overrides.task, unresolved, hydra.runtime.choices)
    _refuse_incomplete(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    preset = hydra.runtime.choices.get("debug")
    try:
        refuse_wrong_values(plain, unresolved)
        if config.task == "pipeline":  # its jobs are checked each on its own
            return
        if config.task != "export":
            refuse_missing_devices(plain["trainer"])
        _refuse_what_does_not_go_together(plain)
    except ValueError as error:
        hint = f"; +debug={preset} sets keys too, for the job that conf/debug/{preset}.yaml names" if preset else ""
        raise ValueError(f"{error}{hint}") from None
    _refuse_mismatched_parts(plain, unresolved)
    if config.ckpt_path is not None:
        for path in named_checkpoints(config.ckpt_path, config.task):
            refuse_other_config(path, plain)
    if is_first():
        refuse_foreign(Path(hydra.runtime.output_dir))


def _refuse_incomplete(config: DictConfig) -> None:
    task, tasks, tested = config.task, options("task"), config.test_ckpt_path
    jobs, data = config.get("pipeline"), config.get("data")
    used = ("scoring.", "geneval.reward.") if task == "score" else ("",)
    missing = min((key for key in OmegaConf.missing_keys(config) if key.startswith(used)), default=None)
    without_data = f"task={task} needs data, and here is none to train on; this config is for task=evaluate"
    for applies, complaint in (
        (task not in tasks, f"task must be one of {', '.join(tasks)}, not {task!r}"),
        (task == "pipeline" and jobs is None, "task=pipeline needs jobs to run: use experiment=pipeline"),
        (task == "export" and config.ckpt_path is None, "task=export needs ckpt_path, the checkpoint to export"),
        (task in ("fit", "rollout") and "_target_" not in (data or {}), without_data),
        (task in ("score", "generate") and config.images is None, f"task={task} needs images=DIR, the folder"),
        (missing, f"{missing} needs a value"),
        (tested not in (None, "best"), f"test_ckpt_path must be null (the last weights) or best, not {tested!r}"),
        (config.ckpt_path == "auto", f"ckpt_path=auto is for task=fit; task={task} needs the path of a checkpoint"),
    ):
        if applies:
            raise ValueError(complaint)


def _refuse_what_does_not_go_together(config: Mapping[str, Any]) -> None:
    """Raise ValueError for choices of which each is fine by itself."""
    module, data, callbacks = config["module"], config.get("data"), config["callbacks"]
    wandb, strategy = config["logger"].get("wandb"), config["trainer"].get("strategy")
    if wandb and wandb.get("log_model") and wandb.get("offline"):
        raise ValueError("logger.wandb.log_model needs logger.wandb.offline=false: Lightning sends none offline")
    if config["task"] in _BUILT:
        return
    folder = config["task"] == "evaluate" and config["ckpt_path"] and Path(config["ckpt_path"]).is_dir()
    if folder and "geneval" not in callbacks:
        raise ValueError("task=evaluate of a folder needs callbacks.geneval, and here is none")
    if data:
        _refuse_other_data(module, data)
    kind = get_class(strategy["_target_"]) if isinstance(strategy, Mapping) else None
    if not (issubclass(kind, FSDPStrategy) if kind else str(strategy).startswith("fsdp")):
        return
    if not (_says(module, "trains_sharded", True) and _says(data, "trains_sharded", True)):
        said = "pairs from files (module=dpo data=preference_files), as task=rollout makes them of data=preferences"
        raise ValueError(f"devices=fsdp trains on images (module=decoder) or on {said}; rollouts are for devices=ddp")
    decoding = (name == "geneval" or (node or {}).get("monitor") == "val/geneval" for name, node in callbacks.items())
    if removed := " ".join(f"~callbacks.{name}" for name in compress(callbacks, decoding)):
        raise ValueError(f"devices=fsdp cannot decode while it trains: add {removed}, and evaluate by devices=ddp")


def _refuse_other_data(module: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    wanted = _says(module, "learns_from", "anything")
    given = _says(data, "gives", wanted)
    if wanted is None:
        raise ValueError("module=evaluation has no use for data: add ~data")
    if wanted == "pairs" != given:
        raise ValueError("module=dpo learns from pairs: use experiment=dpo, or data=preferences or preference_files")
    if wanted == "rollouts" and given == "pairs":
        raise ValueError("module=parm learns from rollouts, not from pairs: use data=rollouts, or module=dpo")


def _says(node: Mapping[str, Any] | None, word: str, otherwise: Any) -> Any:
    """Return what the class of a node says of itself, or `otherwise` where there is none, or one that says nothing."""
    return getattr(get_class(node["_target_"]), word, otherwise) if node and "_target_" in node else otherwise


def _refuse_mismatched_parts(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise for networks, images, detectors and prompts that differ in size or words, and for missing weights."""
    if config["task"] == "generate":
        try:
            refuse_unmarked(Path(config["images"]))
        except ValueError as error:
            raise ValueError(f"{error}; task=score judges what is there") from None
    parts = _BUILT.get(config["task"], ("module", "callbacks", "data"))
    built = {name: config[name] for name in parts if config.get(name)}
    detectors = {key: get_class(node["_target_"]) for key, node in nodes(built) if key.endswith("detector")}
    if config["task"] != "score":
        size = _refuse_mismatched_networks(config, built)
        for key, detector in detectors.items():
            wanted = getattr(detector, "image_size", None)
            if size and wanted and wanted != size:
                said = f"{detector.__name__} looks at images of {wanted}x{wanted} pixels, and the decoder makes"
                key = defining_key(unresolved, key)
                raise ValueError(f"{key}: {said} {size}x{size}; geneval=coco judges photographs of any size")
    if known := next(filter(None, (getattr(detector, "class_names", None) for detector in detectors.values())), None):
        _refuse_unknown_classes(config["geneval"], known)
    for key, node in nodes(built):
        if clip := clip_named(node):
            refuse_other_network(defining_key(unresolved, key), *clip)
    weights = (replace(each, key=defining_key(unresolved, each.key)) for each in named(built))
    refuse_missing(list({each.key: each for each in weights}.values()))


def _refuse_mismatched_networks(config: Mapping[str, Any], built: Mapping[str, Any]) -> int | None:
    """Compare the sizes of decoder, PARM and images, loading nothing; returns the side of images, if it is known."""
    parm, data = built.get("module", {}).get("parm"), built.get("data", {})
    decoder, tokenizer = (config.get(name) for name in ("decoder", "tokenizer"))
    grid, size = None, (config.get("sampling") or {}).get("size")
    if tokenizer:
        with torch.device("meta"):
            network = instantiate(tokenizer["module"], _convert_="all")
        grid, size = network.grid, network.image_size
    if parm and decoder:
        reads, shows = parm["module"], decoder["module"]
        for name, meaning, value in (
            ("feature_layers", "decoder.module.feature_layers", shows.get("feature_layers")),
            ("decoder_dim", "the width of the decoder", shows["transformer"]["dim"]),
            ("grid", "the grid of the image tokenizer", grid),
        ):
            if reads[name] != value:
                raise ValueError(f"parm.module.{name}={reads[name]} does not go with {meaning}, which is {value}")
    if tokenizer and "train_images" in data:
        height, width = instantiate(data["train"], _convert_="all")[0].image.shape[:2]
        if (height, width) != (size, size):
            said = f"images of {width}x{height} pixels, and the image tokenizer reads {size}x{size}"
            raise ValueError(f"data.train gives {said}: point data.train and data.validation at images of that size")
    return size


def _refuse_unknown_classes(geneval: Mapping[str, Any], class_names: Sequence[str]) -> None:
    for name in ("train_prompts", "validation_prompts", "test_prompts"):
        for row in instantiate(geneval[name], _convert_="all") if geneval.get(name) else ():
            for clause in (*row["include"], *row.get("exclude", ())):
                if clause["class"] not in class_names:
                    said = f"{clause['class']!r}, which geneval.reward.detector does not know"
                    known = ", ".join(class_names)
                    raise ValueError(f"geneval.{name}: {row['prompt']!r} asks for {said}; it knows: {known}")
