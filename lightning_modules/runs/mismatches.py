"""Checks of parts that a config names, before any of them is loaded: sizes, words, weights and checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.utils import get_class, get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_modules.backbone.published import clip_named, nodes
from lightning_modules.rewards.open_clip_loader import refuse_other_network
from lightning_modules.runs.checkpoints import named_checkpoints, refuse_other_config
from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.weights import built_parts, refuse_missing_weights, refuse_other_parm


def refuse_mismatches(config: DictConfig) -> None:
    """Refuse a config whose parts do not fit one another, or are not there.

    Raises ValueError, naming the keys, or FileNotFoundError, naming all weights that are missing.
    """
    if config.task == "pipeline":  # its jobs are checked each on its own
        return
    plain: Any = OmegaConf.to_container(config, resolve=True)
    _refuse_mismatched_parts(plain, OmegaConf.to_container(config))  # type: ignore[arg-type]
    if config.ckpt_path is not None:
        for path in named_checkpoints(config.ckpt_path, config.task):
            refuse_other_config(path, plain)


def _refuse_mismatched_parts(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise for networks, images, detectors and prompts that differ in size or words, and for missing weights."""
    built = built_parts(config)
    detectors = {key: get_class(node["_target_"]) for key, node in nodes(built) if key.endswith("detector")}
    if config["task"] != "score":
        size = _refuse_mismatched_networks(config, built)
        _refuse_other_names(built, size)
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
    refuse_missing_weights(built, unresolved)


def _refuse_mismatched_networks(config: Mapping[str, Any], built: Mapping[str, Any]) -> int | None:
    """Compare the sizes of decoder, PARM and images, loading nothing; returns the side of images, if it is known."""
    parm, data = built.get("module", {}).get("parm"), built.get("data", {})
    decoder, tokenizer = (config.get(name) for name in ("decoder", "tokenizer"))
    sizes = [config[part]["size"] for part in ("sampling", "decoder") if "size" in (config.get(part) or ())]
    grid, size = None, next(iter(sizes), None)
    if tokenizer:
        with torch.device("meta"):
            network = instantiate(tokenizer["module"], _convert_="all")
        grid, size = network.grid, network.image_size
    if parm and decoder:
        refuse_other_parm(parm, grid=("the grid of the image tokenizer", grid))
    if tokenizer and "train_images" in data:
        height, width = instantiate(data["train"], _convert_="all")[0].image.shape[:2]
        if (height, width) != (size, size):
            said = f"images of {width}x{height} pixels, and the image tokenizer reads {size}x{size}"
            raise ValueError(f"data.train gives {said}: point data.train and data.validation at images of that size")
    return size


def _refuse_other_names(built: Mapping[str, Any], image_size: int | None) -> None:
    """Raise for a checkpoint whose name says that it is of another model.

    The class that is built of it says so: `check_name(checkpoint, node, image_size)`, the node with the checkpoint.
    """
    for _, node in nodes(built):
        checkpoint, target = node.get("checkpoint"), node.get("module") or node
        if isinstance(checkpoint, str) and isinstance(target, Mapping):
            check = getattr(get_object(target["_target_"]), "check_name", None)
            if check is not None:
                check(checkpoint, node, image_size)


def _refuse_unknown_classes(geneval: Mapping[str, Any], class_names: Sequence[str]) -> None:
    for name in ("train_prompts", "validation_prompts", "test_prompts"):
        for row in instantiate(geneval[name], _convert_="all") if geneval.get(name) else ():
            for clause in (*row["include"], *row.get("exclude", ())):
                if clause["class"] not in class_names:
                    said = f"{clause['class']!r}, which geneval.reward.detector does not know"
                    known = ", ".join(class_names)
                    raise ValueError(f"geneval.{name}: {row['prompt']!r} asks for {said}; it knows: {known}")
