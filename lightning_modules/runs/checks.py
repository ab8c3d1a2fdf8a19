"""Checks of a config before anything is built: names that nothing takes, values of a wrong kind, useless numbers."""

import inspect
import math
import os
import pydoc
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from omegaconf import OmegaConf

from lightning_modules.runs.messages import written_at
from lightning_modules.runs.settings_tree import CLOSE, CONF, GROUPS

_HYDRAS_OWN = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
_SIZES = ("images_per_prompt", "num_nodes", "check_val_every_n_epoch", "every_n_epochs", "samples", "dim",
          "depth", "heads", "epochs_per_round", "validation_images", "train_images",
          "accumulate_grad_batches")  # fmt: skip
_NAMES = ("validation_strategies", "test_strategies")
_NEVER = ("stop_score", "max_fall")  # infinity is for those that nothing reaches
# Texts at the top of the config, some of which may be null.
_TEXTS = {"name": "a text", "task": "a text", "scores_dir": "a path", "rollouts_dir": "a path", "export_dir": "a path"}
_OR_NULL = {"ckpt_path": "a path, auto", "test_ckpt_path": "best", "images": "a path"}
_AMOUNTS = ("lr", "refit_lr", "weight_decay", "gradient_clip_val")
_LIMITS = ("max_steps", "max_epochs")
_MINUS_ONE = ("devices", "save_top_k", "num_sanity_val_steps", "val_check_interval")  # it means all there are
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def refuse_wrong_values(config: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Raise ValueError for a name or a value that does not fit what is built of it; the sentence names the key.

    Some values would be used after hours of work, others compared before anybody says which they are.

    Args:
        config: plain, with its interpolations resolved.
        written: the same with these, which say where a value that many read is written.
    """
    refuse_wrong_texts(config)
    for name in ("trainer", "callbacks", "logger", "sampling", *({"tokenizer"} & {*config})):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{name} must be a group of settings, not {_shown(config.get(name))}")
    for name, node in config["logger"].items():
        if not isinstance(node, Mapping):
            said = f"logger.{name}={_shown(node)} is no logger"
            raise ValueError(f"{said}: ~logger.{name} leaves it out, logger=csv has metrics.csv alone")
    _refuse_below("", config, written)


def refuse_wrong_texts(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a name or a path at the top of the config that is none; interpolations count as texts."""
    for key, what in (_TEXTS | _OR_NULL).items():
        value = config.get(key, key)
        if (isinstance(value, str) and value) or (value is None and key in _OR_NULL):
            continue
        raise ValueError(f"{key} must be {what}{' or null' if key in _OR_NULL else ''}, not {_shown(value)}")


def refuse_unread(overrides: Sequence[str], config: Mapping[str, Any], groups: Iterable[str] = ()) -> None:
    """Raise ValueError for a new key at the top of the config, which no class refuses and nothing reads.

    Args:
        overrides: of the command line.
        config: as it is written; an interpolation may read the key.
        groups: of which a file is chosen, the user's own among them.
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


def refuse_missing_gpus(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for a Trainer on GPUs where there are none, before anything is loaded."""
    wanted = trainer["accelerator"]
    there = {"cuda": CUDAAccelerator.is_available(), "mps": MPSAccelerator.is_available()}
    if there.get(wanted, any(there.values())) or wanted not in ("gpu", *there):
        return
    raise ValueError(
        f"trainer.accelerator={wanted} needs a GPU, and there is none here; instead of devices=ddp or devices=fsdp use "
        "devices=ddp_cpu, which is two processes on the CPU, or set trainer.accelerator=cpu"
    )


def refuse_too_many_processes(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for more processes on the CPU than it has cores; two can always be tried out."""
    wanted, devices = trainer["accelerator"], str(trainer.get("devices"))
    on_cpu = wanted == "cpu" or (
        wanted == "auto" and not (CUDAAccelerator.is_available() or MPSAccelerator.is_available())
    )
    cores = os.cpu_count() or 1
    if on_cpu and devices.isdecimal() and int(devices) > max(2, cores):
        raise ValueError(f"trainer.devices={devices} means as many processes on the CPU, which has {cores} cores")


def _refuse_below(above: str, node: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    takes = _takes(node["_target_"]) if isinstance(node.get("_target_"), str) else {}
    for name, value in node.items():
        key = f"{above}{name}"
        if name in _HYDRAS_OWN or value == "???":
            continue
        if takes and name not in takes and "**" not in takes:
            guess = get_close_matches(str(name), takes, 1, CLOSE)
            advice = f"did you mean {guess[0]}? It" if guess else "it"
            kind, place = str(node["_target_"]).rpartition(".")[2], written_at(written, above[:-1])
            what = f"{kind}, which {place} is, takes no {name}"
            raise ValueError(f"{written_at(written, key)}: {what}; {advice} takes {', '.join(takes)}")
        hint = takes.get(name, Any)
        if complaint := _useless(str(name), value) or (None if _fits(value, hint) else _described(hint, value)):
            raise ValueError(f"{written_at(written, key)} must be {complaint}, not {_shown(value)}")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                _refuse_below(f"{key}.", item, written)


@cache
def _takes(target: str) -> dict[str, Any]:
    """What a class or function takes, with its annotations; `**` if it takes any name, nothing if that is unknown."""
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
    named = [each.name for each in parameters if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    any_name = ["**"] if any(each.kind == kinds.VAR_KEYWORD for each in parameters) else []
    return {name: hints.get(name, Any) for name in [*named, *any_name]}


def _useless(name: str, value: Any) -> str | None:
    """What a number of that name must be, if this one is of no use."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = number and isinstance(value, int)
    if any(math.isnan(each) or (math.isinf(each) and name not in _NEVER) for each in _floats(value)):
        return "finite"
    if name in _NAMES and value == []:
        return "a list of at least one name"
    if name == "val_check_interval" and number and value == 0:
        return "above 0"
    if name in _LIMITS:
        return None if value is None or (whole and value >= -1) else "a whole number, -1 for no limit"
    if (name in _SIZES or name.endswith("batch_size")) and value is not None:
        return None if whole and value >= 1 else "a whole number of at least 1"
    if name in _AMOUNTS and not (name == "gradient_clip_val" and value is None):
        return None if number and value >= 0 else "a number of at least 0"
    if name == "betas":
        pair = isinstance(value, list) and len(value) == 2
        useful = pair and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)
        return None if useful else "two numbers from 0 to below 1"
    if name == "seed":
        return None if value is None or (whole and 0 <= value < 2**32) else "a whole number from 0 to 4294967295"
    if whole and value < 0 and not (name in _MINUS_ONE and value == -1):
        return "a whole number of at least 0"
    return None


def _floats(value: Any) -> Iterator[float]:
    """The floats in a value, those in lists as well."""
    if isinstance(value, float):
        yield value
    for item in value if isinstance(value, list) else ():
        yield from _floats(item)


def _fits(value: Any, hint: Any) -> bool:
    """A plain value, or a node from which an object is built, can be what an annotation says."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if origin is tuple and isinstance(value, list) and Ellipsis not in inner:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    kind = origin or hint
    if not isinstance(kind, type) or kind in (Any, object, type):
        return True  # Any, or what is known to type checkers alone
    if isinstance(value, Mapping):  # some classes take settings as they are
        named = all(_fits(item, inner[1]) for item in value.values() if inner) if issubclass(kind, Mapping) else True
        return kind not in _WORDS and named
    if isinstance(value, list):
        return kind is not str and issubclass(kind, Iterable) and all(_fits(item, inner[0]) for item in value if inner)
    if isinstance(value, str):
        return kind is str or not (kind in _WORDS or issubclass(kind, Iterable))
    if isinstance(value, int) and not isinstance(value, bool):
        return kind in (int, float)
    return kind is type(value)


def _described(hint: Any, value: Any) -> str:
    """What an annotation says, in words; that it may be null as well is no help to who wrote something else."""
    options = [option for option in _options(hint) if option is not type(None)]
    literals = dict.fromkeys(
        str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)
    )
    words = [f"one of {', '.join(literals)}"] if literals else []
    for option in options:
        kind, inner = get_origin(option) or option, get_args(option)
        if kind in _WORDS:
            words.append(_WORDS[kind])
        elif isinstance(kind, type) and issubclass(kind, Mapping):
            words.append("named values, {a: 1}")
        elif isinstance(kind, type) and issubclass(kind, Iterable):
            length = f" of {len(inner)}" if kind is tuple and Ellipsis not in inner else ""
            words.append(f"a list{length}" + ("" if isinstance(value, list | None) else f", [{value}]"))
        elif kind is not Literal:
            words.append(f"a node with _target_ that makes a {getattr(kind, '__name__', kind)}")
    return " or ".join(dict.fromkeys(words))


def _options(hint: Any) -> list[Any]:
    """What a union allows, those in it as well."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _shown(value: Any) -> str:
    return str(value).lower().replace("none", "null") if value is None or isinstance(value, bool) else repr(value)
