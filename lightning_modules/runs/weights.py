"""Checks of the weights that a config names, by files and settings alone: torch is not imported, no tensor is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_modules.backbone.checkpoint_folder import (
    export_folders,
    exported,
    on_hub,
    refuse_other_weights,
    resolve,
    weights_file,
)
from lightning_modules.backbone.published import LOADERS, named, nodes, refuse_missing
from lightning_modules.broken_files import read_settings, refuse_broken
from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.signatures import constant

_OWN = "lightning_modules."
_LOADER = f"{_OWN}backbone.loading.pretrained"
_PARM, _OF_PARM = f"{_OWN}rewards.parm.PARM", ("feature_layers", "decoder_dim", "grid")  # which decide its tensors
_KINDS = ("input_features", "causal")  # of PARM, other networks
# What is built by tasks that need no module, callbacks and data.
_BUILT = {"score": ("scoring",), "generate": ("generating",), "export": ("module",)}


def built_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a resolved config that its task builds."""
    return {
        name: config[name] for name in _BUILT.get(config["task"], ("module", "callbacks", "data")) if config.get(name)
    }


def refuse_unfit_weights(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Refuse weights that are not there, are broken, or were exported from another network.

    Raises FileNotFoundError or ValueError, naming the key.
    """
    built = built_parts(config)
    for key, node in nodes(built):
        _refuse_missing_files(defining_key(unresolved, key), node)
        checkpoint = node.get("checkpoint")
        if node["_target_"] not in LOADERS or not isinstance(checkpoint, str) or on_hub(checkpoint):
            continue
        reader, key = f"{defining_key(unresolved, key)}.checkpoint", defining_key(unresolved, f"{key}.checkpoint")
        advice = "" if reader == key else f"; {reader} is taken from there: name its own"
        if "module" in node:
            _refuse_other_export(key, checkpoint, node["module"], advice)
            continue
        patterns = LOADERS[node["_target_"]]
        files = [path for pattern in patterns for path in sorted(Path(checkpoint).glob(pattern))]
        if not files:
            raise FileNotFoundError(f"{key}: there is no {' or '.join(patterns)} in {checkpoint}{advice}")
        for path in files:
            refuse_broken(path, key)
    refuse_missing_weights(built, unresolved)


def refuse_other_exports(config: Mapping[str, Any]) -> None:
    """Raise ValueError if what `task=export` writes would replace weights of something else."""
    module = config["module"]
    parts = [*constant(module["_target_"], "exported_parts", ()), *(["parm"] if module.get("refit") else [])]
    for name, folder in export_folders(config["export_dir"], parts).items():
        refuse_other_weights(folder, config[name])


def _refuse_missing_files(key: str, node: Mapping[str, Any]) -> None:
    """Raise FileNotFoundError for a path that a class says it `reads` and that is not there."""
    for name in constant(node["_target_"], "reads", ()):
        path = node.get(name)
        if isinstance(path, str) and not path.startswith("bundled:") and not Path(path).exists():
            raise FileNotFoundError(f"{key}.{name}: there is no {path}")
    start = node.get("start")
    if node["_target_"] == _LOADER and isinstance(start, str) and not on_hub(start):
        try:
            resolve(start)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key}.start: {error}") from None


def refuse_missing_weights(built: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise FileNotFoundError for published weights that are not to be had, all of them at once."""
    weights = (replace(each, key=defining_key(unresolved, each.key)) for each in named(built))
    refuse_missing(list({each.key: each for each in weights}.values()))


def _refuse_other_export(key: str, checkpoint: str, module: Mapping[str, Any], advice: str) -> None:
    """Raise for weights of this package's own format that are not there, are broken or are of another network."""
    try:
        folder = resolve(checkpoint)
        refuse_broken(weights_file(folder))
        if (folder / "config.json").is_file():
            read_settings(folder / "config.json")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    stored = exported(folder)
    kinds = [str(each.get("_target_", "")) for each in (stored, module)]
    if kinds[0] != kinds[1] and all(kind.startswith(_OWN) for kind in kinds):  # a class of yours may be one of ours
        there, here = (kind.rpartition(".")[2] for kind in kinds)
        raise ValueError(f"{key}: {checkpoint} holds the weights of a {there}, not of a {here}{advice}")
    if kinds[0] == _PARM:
        for name in _OF_PARM:
            if stored.get(name) != module.get(name):
                said = f"{name} is {stored.get(name)} there, and {module.get(name)} here"
                raise ValueError(f"{key}: {checkpoint} was made for another decoder: {said}")
    named = (each.get("transformer") for each in (stored, module))
    sizes: list[Mapping[str, Any]] = [each if isinstance(each, Mapping) else {} for each in named]  # or a name of yours
    own = module.items() if kinds[0].startswith(_OWN) else ()
    numbers = {name: value for name, value in own if type(value) is int or name in _KINDS}
    for place, before, now in (("", stored, numbers), ("transformer.", sizes[0], sizes[1])):
        for name in before.keys() & now.keys() - {"_target_", "checkpointing"}:
            if before[name] != now[name]:
                said = f"was made for another model: {place}{name} is {before[name]} there, and {now[name]} here"
                raise ValueError(f"{key}: {checkpoint} {said}")
