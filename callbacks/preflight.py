"""What is refused before anything is built: parts that do not go together, and weights that are not there."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate

from callbacks.messages import written_at
from datamodules.pairs import PairsDataModule
from datamodules.rollouts import refuse_unmarked
from lightning_modules.backbone.published import Published, clip_named, named, nodes, refuse_missing
from lightning_modules.dpo import DPOModule
from lightning_modules.parm import PARMModule
from lightning_modules.rewards.open_clip_loader import refuse_other_network

# What a task builds.
_BUILT = {"score": ("scoring",), "generate": ("generating",), "export": ("module",)}


def preflight(config: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Refuse a config whose parts cannot work together, or whose weights are missing.

    Args:
        config: resolved.
        written: the same as it is written, with its interpolations: errors name the keys that users set.

    Raises:
        ValueError: parts do not go together, or the folder for images holds others; the sentence names the keys.
        FileNotFoundError: weights are missing, all of which are named; or what should be a file of CLIP's is none.
    """
    if config["task"] == "generate":
        try:
            refuse_unmarked(Path(config["images"]))
        except ValueError as error:
            raise ValueError(f"{error}; task=score judges what is there") from None
    parts = _BUILT.get(config["task"], ("module", "callbacks", "data"))
    built = {name: config[name] for name in parts if config.get(name)}
    if config["task"] != "score":
        _refuse_other_data(built)
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


def _refuse_other_data(built: Mapping[str, Any]) -> None:
    """Refuse data that the module does not learn from."""
    targets = [built.get(name, {}).get("_target_") for name in ("module", "data")]
    if not all(targets):
        return
    module, data = map(get_class, targets)
    if issubclass(module, DPOModule) and not issubclass(data, PairsDataModule):
        raise ValueError("module=dpo learns from pairs: use experiment=dpo, or data=preferences or preference_files")
    if issubclass(module, PARMModule) and issubclass(data, PairsDataModule):
        raise ValueError("module=parm learns from rollouts, not from pairs: use data=rollouts, or module=dpo")


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
            ("evidence_depths", "decoder.module.evidence_depths", shows.get("evidence_depths")),
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
