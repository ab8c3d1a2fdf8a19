"""Checks of parts whose sizes only their networks tell: these are made without memory, before any of them is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_modules.backbone.published import nodes
from lightning_modules.runs.checkpoints import named_checkpoints, refuse_other_config
from lightning_modules.runs.fitting import refuse_other_images, refuse_other_parm, refuse_unknown_classes
from lightning_modules.runs.weights import built_parts


def refuse_mismatches(config: DictConfig) -> None:
    """Raise ValueError for a config whose networks, images or checkpoint do not fit one another, naming the keys."""
    if config.task == "pipeline":  # its jobs are checked each on its own
        return
    plain: Any = OmegaConf.to_container(config, resolve=True)
    built = built_parts(plain)
    if config.task != "score":
        detectors = (node["_target_"] for key, node in nodes(built) if key.endswith("detector"))
        if known := next(filter(None, (_attribute(detector, "class_names", None) for detector in detectors)), None):
            refuse_unknown_classes(plain["geneval"], known)
        _refuse_mismatched_networks(plain, OmegaConf.to_container(config))  # type: ignore[arg-type]
    if config.ckpt_path is not None:
        for path in named_checkpoints(config.ckpt_path, config.task):
            refuse_other_config(path, plain)


def _attribute(target: str, name: str, otherwise: Any) -> Any:
    return getattr(get_object(target), name, otherwise)


def _refuse_mismatched_networks(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Compare the sizes of decoder, PARM, detector and images, as the networks say of themselves."""
    built, tokenizer = built_parts(config), config.get("tokenizer")
    if not tokenizer:
        return
    parm, data = built.get("module", {}).get("parm"), built.get("data", {})
    with torch.device("meta"):
        network = instantiate(tokenizer["module"], _convert_="all")
    size = network.image_size
    if parm and config.get("decoder"):
        refuse_other_parm(parm, {"grid": ("the grid of the image tokenizer", network.grid)})
    refuse_other_images(built, unresolved, size, _attribute)
    if "train_images" in data:
        train = instantiate({"data": {"train": data["train"]}}, _convert_="all")["data"]["train"]  # errors name it so
        height, width = train[0].image.shape[:2]
        if (height, width) != (size, size):
            said = f"images of {width}x{height} pixels, and the image tokenizer reads {size}x{size}"
            raise ValueError(f"data.train gives {said}: point data.train and data.validation at images of that size")
