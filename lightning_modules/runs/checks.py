"""Checks of a config before anything is built: names that nothing takes, values of a wrong kind, useless numbers."""

import inspect
import json
import math
import os
import pydoc
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from omegaconf import OmegaConf

from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.settings_tree import CLOSE, CONF, GROUPS

_HYDRAS_OWN = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
# Texts at the top of the config.
_TEXTS = {"name": "a text", "task": "a text", "scores_dir": "a path", "rollouts_dir": "a path",
          "export_dir": "a path", "ckpt_path": "a path, auto or null", "test_ckpt_path": "best or null",
          "images": "a path or null"}  # fmt: skip
_MAY_BE_INFINITE = ("stop_score", "max_fall")  # which nothing reaches then
_MINUS_ONE = ("devices", "save_top_k", "num_sanity_val_steps", "val_check_interval")  # it means all there are
_SIZES = ("batch_size", "images_per_prompt", "sheet_prompts", "num_nodes", "check_val_every_n_epoch", "every_n_epochs",
          "samples", "dim", "depth", "heads", "validation_images", "train_images",
          "accumulate_grad_batches")  # fmt: skip
# Kind, least and largest value of numbers by their names, and the same in words.
_RANGES: dict[str, tuple[Any, float, float, str]] = {
    **dict.fromkeys(_SIZES, (int, 1, math.inf, "a whole number of at least 1")),
    **dict.fromkeys(("max_steps", "max_epochs"), (int, -1, math.inf, "a whole number, -1 for no limit")),
    **dict.fromkeys(
        ("lr", "refit_lr", "weight_decay", "gradient_clip_val"), (int | float, 0, math.inf, "a number of at least 0")
    ),
    "seed": (int, 0, 2**32 - 1, "a whole number from 0 to 4294967295"),
}
_WORDS = {bool: ["true or false"], int: ["a whole number"], float: ["a number"], str: ["a text"], type(None): []}


def refuse_wrong_values(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise ValueError for a name or a value that does not fit what is built of it; the sentence names the key.

    Some values would be used after hours of work, others compared before anybody says which they are. `unresolved` is
    the config with its interpolations, which say under which key a value is set that many read.
    """
    refuse_wrong_texts(config)
    for name in ("trainer", "callbacks", "logger", "sampling", *({"tokenizer"} & {*config})):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{name} must be a group of settings, not {_shown(config.get(name))}")
    for name, node in config["logger"].items():
        if not isinstance(node, Mapping):
            said = f"logger.{name}={_shown(node)} is no logger"
            raise ValueError(f"{said}: ~logger.{name} leaves it out, logger=csv has metrics.csv alone")
    _refuse_below("", config, unresolved)


def refuse_wrong_texts(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a name or a path at the top of the config that is none; interpolations count as texts."""
    for key, wanted in _TEXTS.items():
        value = config.get(key, key)
        if not (isinstance(value, str) and value) and not (value is None and wanted.endswith("null")):
            raise ValueError(f"{key} must be {wanted}, not {_shown(value)}")


def refuse_unread(overrides: Sequence[str], config: Mapping[str, Any], groups: Iterable[str] = ()) -> None:
    """Raise ValueError for an override that adds a key at the top of the config, which no class refuses or reads.

    Interpolations of the config, unresolved, may read it; `groups` are those of which a file is chosen.
    """
    known = [*GROUPS, *groups, *OmegaConf.load(CONF / "train.yaml"), "pipeline"]
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        top = key.partition(".")[0]
        if override[0] != "+" or re.split("[/@]", top)[0] in known or f"${{{top}" in str(config):
            continue
        guess = get_close_matches(top, known, 1, CLOSE)
        advice = f"did you mean {override.replace(top, guess[0], 1)}?" if guess else "it has no effect"
        raise ValueError(f"nothing reads the key {key}; {advice}")


def refuse_missing_devices(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for a Trainer on GPUs that are not there, or with more processes on the CPU than it has cores.

    Two processes can always be tried out.
    """
    wanted, devices = trainer["accelerator"], str(trainer.get("devices"))
    there = {"cuda": CUDAAccelerator.is_available(), "mps": MPSAccelerator.is_available()}
    if wanted in ("gpu", *there) and not there.get(wanted, any(there.values())):
        raise ValueError(
            f"trainer.accelerator={wanted} needs a GPU, and there is none here; instead of devices=ddp or devices=fsdp "
            "use devices=ddp_cpu, which is two processes on the CPU, or set trainer.accelerator=cpu"
        )
    on_cpu = wanted == "cpu" or (wanted == "auto" and not any(there.values()))
    cores = os.cpu_count() or 1
    if on_cpu and devices.isdecimal() and int(devices) > max(2, cores):
        raise ValueError(f"trainer.devices={devices} means as many processes on the CPU, which has {cores} cores")


def _refuse_below(above: str, node: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    takes = _takes(node["_target_"]) if isinstance(node.get("_target_"), str) else {}
    for name, value in node.items():
        if name in _HYDRAS_OWN or value == "???":
            continue
        place = defining_key(unresolved, f"{above}{name}")
        if takes and name not in takes and "**" not in takes:
            guess = get_close_matches(str(name), takes, 1, CLOSE)
            advice = f"did you mean {guess[0]}? It" if guess else "it"
            kind, whose = str(node["_target_"]).rpartition(".")[2], defining_key(unresolved, above[:-1])
            raise ValueError(f"{place}: {kind}, which {whose} is, takes no {name}; {advice} takes {', '.join(takes)}")
        if complaint := _useless(str(name), value) or " or ".join(_unfit(value, takes.get(name, Any)) or ()):
            raise ValueError(f"{place} must be {complaint}, not {_shown(value)}")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                _refuse_below(f"{above}{name}.", item, unresolved)


@cache
def _takes(target: str) -> dict[str, Any]:
    """List what a class or function takes, with annotations; `**` if it takes any name, nothing if that is unknown."""
    try:
        found: Any = pydoc.locate(target)
        parameters = inspect.signature(found).parameters.values()
    except (pydoc.ErrorDuringImport, TypeError, ValueError):  # told when it is built
        return {}
    try:
        hints = get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except NameError:  # of names that only type checkers import
        hints = {each.name: each.annotation for each in parameters if not isinstance(each.annotation, str)}
    kinds = inspect.Parameter
    names: dict[Any, str | None] = {kinds.POSITIONAL_ONLY: None, kinds.VAR_POSITIONAL: None, kinds.VAR_KEYWORD: "**"}
    return {name: hints.get(name, Any) for each in parameters if (name := names.get(each.kind, each.name))}


def _useless(name: str, value: Any) -> str | None:
    """Say what a value of that name must be, if this one is of no use."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, float) and (math.isnan(each) or (math.isinf(each) and name not in _MAY_BE_INFINITE)):
            return "finite"
    if name in ("validation_strategies", "test_strategies") and value == []:
        return "a list of at least one name"
    if name == "val_check_interval" and number and value == 0:
        return "above 0"
    if name == "betas":
        pair = isinstance(value, list) and len(value) == 2
        useful = pair and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)
        return None if useful else "two numbers from 0 to below 1"
    known = _RANGES.get("batch_size" if name.endswith("batch_size") else name)
    if known and value is not None:
        kinds, least, most, wanted = known
        return None if number and isinstance(value, kinds) and least <= value <= most else wanted
    too_small = number and isinstance(value, int) and value < (-1 if name in _MINUS_ONE else 0)
    return "a whole number of at least 0" if too_small else None


def _unfit(value: Any, hint: Any) -> list[str] | None:
    """Say in words what an annotation asks for; None if a plain value, or a node that makes an object, is that.

    That null is allowed as well is no help to who wrote something else.
    """
    origin, inner = get_origin(hint), get_args(hint)
    kind = origin or hint
    if origin in (Union, types.UnionType):
        literals = [choice for option in inner if get_origin(option) is Literal for choice in get_args(option)]
        options = [Literal[tuple(literals)]] if literals else []
        found = [_unfit(value, each) for each in [*options, *(o for o in inner if get_origin(o) is not Literal)]]
        return None if None in found else list(dict.fromkeys(word for words in found for word in words or ()))
    if origin is Literal:
        return None if value in inner else [f"one of {', '.join(dict.fromkeys(map(str, inner)))}"]
    is_node = isinstance(value, Mapping) and "_target_" in value
    if is_node or not isinstance(kind, type) or kind in (Any, object, type):  # or what type checkers alone know
        return None
    if kind in _WORDS:
        fits, words = kind is type(value) or (kind is float and type(value) is int), _WORDS[kind]
    elif issubclass(kind, Mapping):
        fits = isinstance(value, Mapping) and all(_unfit(item, inner[1]) is None for item in value.values() if inner)
        words = ["named values, {a: 1}"]
    elif issubclass(kind, Iterable):
        several = origin is tuple and Ellipsis not in inner
        fits = isinstance(value, Mapping) or (isinstance(value, list) and (not several or len(value) == len(inner)))
        if fits and isinstance(value, list):
            hints = inner if several else inner[:1] * len(value)
            fits = all(_unfit(item, each) is None for item, each in zip(value, hints, strict=False))
        example = "" if isinstance(value, list | None) else f", [{value}]"
        words = [f"a list{f' of {len(inner)}' if several else ''}{example}"]
    else:  # some classes take settings as they are
        fits, words = isinstance(value, Mapping | str), [f"a node with _target_ that makes a {kind.__name__}"]
    return None if fits else words


def _shown(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
