"""Checks that the parts of a config fit one another, by settings alone: torch is not imported, nothing is loaded."""

import ast
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hydra.utils import instantiate

from lightning_modules.backbone.published import clip_named, nodes
from lightning_modules.rewards.open_clip_weights import refuse_other_network
from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.signatures import constant, lineage, locate, named_class
from lightning_modules.runs.weights import built_parts


def refuse_unfit_parts(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Refuse networks, images, detectors and prompts that differ in size or words.

    Raises ValueError, or FileNotFoundError for weights that open_clip does not know, naming the key.
    """
    built = built_parts(config)
    parm, decoder, tokenizer = built.get("module", {}).get("parm"), config.get("decoder"), config.get("tokenizer") or {}
    network, transformer = _settings(decoder or {}, "module"), _settings(decoder or {}, "module", "transformer")
    layers, depth = network.get("feature_layers"), transformer.get("depth")
    if isinstance(layers, list) and isinstance(depth, int) and not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"decoder.module.feature_layers={layers} must lie in 1..{depth}, the decoder's layers")
    if parm and decoder:
        grid = _settings(tokenizer, "module").get("grid", _settings(config, "for_parm").get("grid"))
        wanted = {
            "feature_layers": ("decoder.module.feature_layers", network.get("feature_layers")),
            "decoder_dim": ("the width of the decoder", transformer.get("dim")),
            "grid": ("the grid of the image tokenizer", grid),
        }
        refuse_other_parm(parm, {name: each for name, each in wanted.items() if each[1] is not None})
    if decoder and config["task"] not in ("score", "export"):
        _refuse_other_sampling(config, unresolved)
    if config["task"] != "score":
        refuse_other_images(built, unresolved, image_size(config), constant)
        evaluates = config["task"] in ("fit", "evaluate") and config["callbacks"].get("geneval")
        measured = ("validation_prompts", "test_prompts") if evaluates else ()
        prompts = {key: node for key, node in config["geneval"].items() if isinstance(node, Mapping)}
        if names := class_names(built):
            read = {key: node for key, node in prompts.items() if "path" in node or key in measured}
            refuse_unknown_classes(read, names)
    for key, node in nodes(built):
        if clip := clip_named(node):
            refuse_other_network(defining_key(unresolved, key), *clip, node.get("require_pretrained", False))


def _refuse_other_sampling(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of sampling in strategies that are of another kind of decoder."""
    decoder = config["decoder"]
    target = str((_settings(decoder, "module") or decoder).get("_target_"))
    wanted = named_class(target, "sampling_type")
    grid = _settings(config, "tokenizer", "module").get("grid")
    for key, node in nodes(config["strategies"], "strategies"):
        given = locate(str(_settings(node, "sampling").get("_target_")))
        if wanted and given and isinstance(given.node, ast.ClassDef) and wanted not in lineage(given):
            names = [getattr(each.node, "name", "") for each in (given, wanted)]
            place, kind = defining_key(unresolved, f"{key}.sampling"), target.rpartition(".")[2]
            raise ValueError(f"{place} is a {names[0]}, and a {kind} takes a {names[1]}")
        stride = node.get("stride")
        steps = _settings(node, "sampling").get("steps") or (grid**2 if type(grid) is int else None)
        if type(stride) is type(steps) is int and stride > steps:
            said = f"{stride} is more than the {steps} steps of an image"
            raise ValueError(f"{defining_key(unresolved, f'{key}.stride')}={said}")


def class_names(built: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the classes that the detector knows; None if neither its settings nor its class say it."""
    detectors = (node for key, node in nodes(built) if key.endswith("detector"))
    known = (node.get("class_names") or constant(node["_target_"], "class_names", None) for node in detectors)
    return next(filter(None, known), None)


def refuse_other_parm(parm: Mapping[str, Any], wanted: Mapping[str, tuple[str, Any]]) -> None:
    """Raise ValueError for a PARM that was not made for the decoder: settings that have a meaning and its value."""
    for name, (meaning, value) in wanted.items():
        if (given := _settings(parm, "module").get(name, value)) != value:
            raise ValueError(f"parm.module.{name}={given} does not go with {meaning}, which is {value}")


def image_size(config: Mapping[str, Any]) -> int | None:
    """Return the side of the images that the decoder makes, pixels, as far as settings tell."""
    for part, name in (("sampling", "size"), ("decoder", "size"), ("tokenizer", "image_size")):
        node = _settings(config, part)
        if part == "tokenizer":
            node = _settings(node, "module")
            node = _settings(node, "config") or node
        if node.get(name):
            return int(node[name])
    return None


def refuse_other_images(
    built: Mapping[str, Any], unresolved: Mapping[str, Any], size: int | None, says: Callable[[str, str, Any], Any]
) -> None:
    """Raise ValueError for checkpoints and detectors that are for images of another size, if it is known.

    `says(target, name, otherwise)` is what a class says of itself. One that can tell from the name of a checkpoint that
    it is of another model names, as `name_check`, a function that does: it is called with the checkpoint, its node and
    the size.
    """
    for key, node in nodes(built):
        checkpoint, target = node.get("checkpoint"), node.get("module") or node
        if isinstance(checkpoint, str) and isinstance(target, Mapping):
            module, _, name = says(str(target.get("_target_")), "name_check", "").rpartition(".")
            try:
                if module:
                    getattr(import_module(module), name)(checkpoint, node, size)
            except ValueError as error:
                raise ValueError(f"{defining_key(unresolved, f'{key}.checkpoint')}: {error}") from None
        if not key.endswith("detector"):
            continue
        wanted, kind = says(node["_target_"], "image_size", None), node["_target_"].rpartition(".")[2]
        if size and wanted and wanted != size:
            said = f"{kind} looks at images of {wanted}x{wanted} pixels, and the decoder makes {size}x{size}"
            raise ValueError(f"{defining_key(unresolved, key)}: {said}; geneval=coco judges photographs of any size")


def _settings(node: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the settings under some names, one in the other; none where they are left out, or something else."""
    for name in names:
        found = node.get(name)
        node = found if isinstance(found, Mapping) else {}
    return node


def refuse_unknown_classes(geneval: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError if a prompt asks for what the detector does not know."""
    for name in ("train_prompts", "validation_prompts", "test_prompts"):
        for row in instantiate(geneval[name], _convert_="all") if geneval.get(name) else ():
            for clause in (*row["include"], *row.get("exclude", ())):
                if clause["class"] not in names:
                    said = f"{clause['class']!r}, which geneval.reward.detector does not know"
                    known = ", ".join(names)
                    raise ValueError(f"geneval.{name}: {row['prompt']!r} asks for {said}; it knows: {known}")
