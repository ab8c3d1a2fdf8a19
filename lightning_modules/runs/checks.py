"""Checks of a config before anything is built: names that nothing takes, values of a wrong kind, useless numbers."""

import json
import math
import os
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf

from lightning_modules.runs.messages import defining_key
from lightning_modules.runs.settings_tree import CLOSE, CONF, GROUPS
from lightning_modules.runs.signatures import is_missing, required, signature

_HYDRAS_OWN = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
# Texts at the top of the config.
_TEXTS = {"name": "a text", "task": "a text", "scores_dir": "a path", "rollouts_dir": "a path",
          "export_dir": "a path", "ckpt_path": "a path, auto or null", "test_ckpt_path": "best or null",
          "images": "a path or null"}  # fmt: skip
_PARTS = ("trainer", "module", "decoder", "tokenizer", "judges", "evaluator")  # made by nodes
_MAY_BE_INFINITE = ("stop_score", "max_fall")  # which nothing reaches then
_MAY_BE_NEGATIVE = ("stop_score", "threshold")  # log-values
_MINUS_ONE = ("devices", "save_top_k", "num_sanity_val_steps")  # it means all there are
_SIZES = ("batch_size", "images_per_prompt", "sheet_prompts", "num_nodes", "check_val_every_n_epoch", "every_n_epochs",
          "samples", "dim", "depth", "heads", "n", "k", "stride", "rounds", "validation_images", "train_images",
          "accumulate_grad_batches", "per_prompt", "n_masks", "steps", "inner_epochs")  # fmt: skip
_NOT_EMPTY = ("validation_strategies", "test_strategies", "relations", "changes")
_FRACTIONS = ("prompt_dropout", "feature_dropout", "finished", "share")
_BATCHES = ("val_check_interval", "overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches",
            "limit_predict_batches")  # fmt: skip
_RATES = ("lr", "refit_lr", "weight_decay", "gradient_clip_val", "guidance", "beta")
_MORE_THAN_0 = math.ulp(0.0)
# Kind, least and largest value of numbers by their names, and the same in words.
_RANGES: dict[str, tuple[Any, float, float, str]] = {
    **dict.fromkeys(_SIZES, (int, 1, math.inf, "a whole number of at least 1")),
    **dict.fromkeys(("max_steps", "max_epochs"), (int, -1, math.inf, "a whole number, -1 for no limit")),
    **dict.fromkeys(_RATES, (int | float, 0, math.inf, "a number of at least 0")),
    **dict.fromkeys(
        ("Sampling.temperature", "min_margin", "max_advantage"), (int | float, _MORE_THAN_0, math.inf, "above 0")
    ),
    "per_task": (int, 1, math.inf, "a whole number of at least 1 or named values, {a: 1}"),
    **dict.fromkeys(_FRACTIONS, (int | float, 0, 1, "a number from 0 to 1")),
    "MaskWarmup.start": (int | float, _MORE_THAN_0, 1, "above 0 and at most 1"),
    "FID.count": (int, 2, math.inf, "a whole number of at least 2, images to compare with"),
    "quantile": (int | float, _MORE_THAN_0, math.nextafter(1, 0), "above 0 and below 1"),
    "window": (int, 2, math.inf, "a whole number of at least 2"),
    "curriculum": (int | float, 0, math.nextafter(1, 0), "at least 0 and below 1"),
    "max_weight": (int | float, 1, math.inf, "at least 1, the average"),
    "top_p": (int | float, _MORE_THAN_0, 1, "above 0 and at most 1"),
    "seed": (int, 0, 2**32 - 1, "a whole number from 0 to 4294967295"),
}
# Names of Lightning's.
_LIGHTNINGS = {
    "accelerator": "auto|cpu|cuda|gpu|mps|tpu",
    "strategy": r"(?i)auto|ddp(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?|deepspeed\w*|"
    r"fsdp(_cpu_offload)?|single_(device|tpu|xla)|xla(_debug)?",
    "profiler": "(?i)simple|advanced|pytorch|xla",
    "gradient_clip_algorithm": "(?i)norm|value",
}
_NAMED = {"accelerator": "auto, cpu, cuda, gpu, mps and tpu", "strategy": "auto, ddp, fsdp and others",
          "profiler": "simple, advanced, pytorch and xla", "gradient_clip_algorithm": "norm and value"}  # fmt: skip
# Packages whose classes are made by a node; those of others may be given as settings.
_MADE = ("callbacks", "datamodules", "lightning_modules", "lightning", "torch")
_WORDS = {bool: ["true or false"], int: ["a whole number"], float: ["a number"], str: ["a text"], type(None): []}


def refuse_wrong_values(config: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Raise ValueError for a name or a value that does not fit what is built of it, naming the key that sets it."""
    refuse_wrong_texts(config)
    for name in ("trainer", "callbacks", "logger", "module", "sampling", *({"tokenizer"} & {*config})):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{name} must be a group of settings, not {_shown(config.get(name))}")
    for name, node in config["logger"].items():
        if not isinstance(node, Mapping):
            said = f"~logger.{name} leaves it out, logger=csv has metrics.csv alone"
            raise ValueError(f"logger.{name}={_shown(node)} is no logger: {said}")
    for name, node in config["strategies"].items() if isinstance(config.get("strategies"), Mapping) else ():
        if not (isinstance(node, Mapping) and "_target_" in node):
            chosen = f"+strategy@strategies.{name}=FILE takes one of conf/strategy"
            raise ValueError(f"strategies.{name} must be a node with _target_, Strategy, not {_shown(node)}; {chosen}")
    made = {name: config[name] for name in _PARTS if name in config}
    if config["module"].get("parm") is None:
        made.pop("parm", None)  # settings of a debug file, for those of its jobs that have one
    made |= {f"{group}.{name}": node for group in ("callbacks", "logger") for name, node in config[group].items()}
    for key, node in made.items():
        if node is not None and not (isinstance(node, Mapping) and isinstance(node.get("_target_"), str)):
            raise ValueError(f"{key} must be a node with _target_, the class that it makes, not {_shown(node)}")
    _refuse_below("", config, unresolved)


def refuse_wrong_texts(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a name or a path at the top of the config that is none; interpolations count as texts."""
    for key, wanted in _TEXTS.items():
        value = config.get(key, key)
        if key == "name" and ".." in str(value).split("/"):
            raise ValueError(f"name={value} leads out of the folder of all runs: leave out the ..")
        if not (isinstance(value, str) and value) and not (value is None and wanted.endswith("null")):
            raise ValueError(f"{key} must be {wanted}, not {_shown(value)}")


def refuse_unread(overrides: Sequence[str], config: Mapping[str, Any], groups: Iterable[str] = ()) -> None:
    """Raise ValueError for an override that adds a key to the unresolved config, beside `groups`, that is not read."""
    known: list[str] = []
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        top = key.partition(".")[0]
        if re.match(r"\+strategy(@strategies)?=", override):
            chosen = override.partition("=")[2]
            raise ValueError(f"a strategy is chosen for a name: write +strategy@strategies.NAME={chosen}")
        if override[0] != "+":
            continue
        known = known or [*GROUPS, *groups, *OmegaConf.load(CONF / "train.yaml"), "pipeline"]
        if re.split("[/@]", top)[0] in known or f"${{{top}" in str(config):
            continue
        guess = get_close_matches(top, known, 1, CLOSE)
        advice = f"did you mean {override.replace(top, guess[0], 1)}?" if guess else "it has no effect"
        raise ValueError(f"nothing reads the key {key}; {advice}")


def refuse_missing_devices(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for a Trainer on GPUs that are not there, or with more processes than 2 and the CPU's cores.

    So for accelerators and strategies of which Lightning has none of that name.
    """
    for name, known in _LIGHTNINGS.items():
        value = trainer.get(name)
        if isinstance(value, str) and not re.fullmatch(known, value):
            raise ValueError(f"trainer.{name}={value}: Lightning has none of that name; there are {_NAMED[name]}")
    wanted, devices, cores = (
        trainer.get("accelerator", "auto"),
        str(trainer.get("devices") or "auto"),
        os.cpu_count() or 1,
    )
    ids, several = devices != "auto" and not devices.isdecimal(), devices.isdecimal() and int(devices) > 2
    if wanted in ("cpu", "auto") and not (several or ids):  # fits any machine
        return
    if wanted == "tpu" and find_spec("torch_xla") is None:
        raise ValueError("trainer.accelerator=tpu needs torch_xla, which is not installed")
    there = {}
    if wanted != "cpu":
        import torch  # takes seconds

        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted in ("gpu", *there) and not there.get(wanted, any(there.values())):
        instead = "instead of devices=ddp or devices=fsdp use devices=ddp_cpu, or set trainer.accelerator=cpu"
        raise ValueError(f"trainer.accelerator={wanted} needs a GPU, and there is none here; {instead}")
    on_cpu = wanted == "cpu" or (wanted == "auto" and not any(there.values()))
    if on_cpu and ids:
        raise ValueError(f"trainer.devices={devices} names GPUs, and there is none here; a CPU takes a number")
    if on_cpu and several and int(devices) > cores:
        raise ValueError(f"trainer.devices={devices} means as many processes on the CPU, which has {cores} cores")


def refuse_unknown_strategies(
    geneval: Mapping[str, Any], known: Collection[str], unresolved: Mapping[str, Any] | None = None
) -> None:
    """Raise ValueError for names of the GenEval callback that are no strategy's, or are not measured.

    With the `unresolved` config it names the keys that set them.
    """
    measured = geneval["validation_strategies"]
    named = {"validation_strategies": measured, "test_strategies": geneval["test_strategies"] or []}
    keys = {name: defining_key(unresolved or {}, f"callbacks.geneval.{name}") for name in (*named, "monitor")}
    for name, names in {**named, "monitor": [geneval["monitor"]]}.items():
        if unknown := [each for each in names if each not in known]:
            raise ValueError(f"{keys[name]} names the strategy {unknown[0]!r}; there are: {', '.join(known)}")
    if geneval["monitor"] not in measured:
        there = f"{keys['validation_strategies']}: {', '.join(measured)}"
        raise ValueError(f"{keys['monitor']} is {geneval['monitor']!r}, and that is not among {there}")


def _refuse_below(
    above: str, node: Mapping[str, Any], unresolved: Mapping[str, Any], inner: Any = Any, known: bool = True
) -> None:
    """Refuse names and values in a node, or in named values that are to be `inner`.

    What numbers mean is `known` by their names where they are given to the project's own classes, Lightning's, torch's.
    """
    target = node["_target_"] if isinstance(node.get("_target_"), str) else ""
    if node.get("_target_") == "":
        raise ValueError(f"{defining_key(unresolved, above[:-1])}._target_ must name a class, not ''")
    known = target.partition(".")[0] in _MADE if target else known
    if target and is_missing(target):
        raise ValueError(f"{defining_key(unresolved, above[:-1])}._target_: there is no {target}")
    if node.get("random_stop") is True and node.get("stride", 1) != 1:
        stride = defining_key(unresolved, f"{above}stride")
        raise ValueError(f"{stride} must be 1 where random_stop is true, not {node['stride']}")
    if type(node.get("dim")) is type(node.get("heads")) is int and node["heads"] > 0 and node["dim"] % node["heads"]:
        width = defining_key(unresolved, f"{above}dim")
        raise ValueError(f"{width} must be a multiple of heads, {node['heads']}, not {node['dim']}")
    takes = signature(target)
    if not {"_partial_", "_args_"} & {*node} and (lacking := [name for name in required(target) if name not in node]):
        whose, kind = defining_key(unresolved, above[:-1]), target.rpartition(".")[2]
        raise ValueError(f"there is no key {whose}.{lacking[0]}, which {kind} needs")
    for name, value in node.items():
        if name in _HYDRAS_OWN or value == "???":
            continue
        place = defining_key(unresolved, f"{above}{name}")
        if takes and name not in takes and "**" not in takes:
            guess = get_close_matches(str(name), takes, 1, CLOSE)
            advice = f"did you mean {guess[0]}? It" if guess else "it"
            kind, whose = target.rpartition(".")[2], defining_key(unresolved, above[:-1])
            raise ValueError(f"{place}: {kind}, which {whose} is, takes no {name}; {advice} takes {', '.join(takes)}")
        useless = _useless(str(name), target.rpartition(".")[2], value) if known else None
        if complaint := useless or " or ".join(_unfit(value, takes.get(name, inner)) or ()):
            raise ValueError(f"{place} must be {complaint}, not {_shown(value)}")
        origin = get_origin(takes.get(name))
        is_named = isinstance(origin, type) and issubclass(origin, Mapping) and "_target_" not in value
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                _refuse_below(f"{above}{name}.", item, unresolved, get_args(takes[name])[1] if is_named else Any, known)


def _useless(name: str, kind: str, value: Any) -> str | None:
    """Say what a value of that name must be for an object of that kind, if this one is of no use."""
    items, number = value if isinstance(value, list) else [value], type(value) in (int, float)
    broken = [each for each in items if isinstance(each, float) and not math.isfinite(each)]
    numbers = len(items) == 2 and all(isinstance(share, int | float) for share in items)
    known = _RANGES.get(f"{kind}.{name}", _RANGES.get("batch_size" if name.endswith("batch_size") else name))
    kinds, least, most, wanted = known or (int, -1 if name in _MINUS_ONE else 0, math.inf, "")
    in_range = number and isinstance(value, kinds) and least <= value <= most
    useless = {
        "finite": any(math.isnan(each) or name not in _MAY_BE_INFINITE for each in broken),
        "a node with _target_": name == "sampling" and isinstance(value, Mapping) and value and "_target_" not in value,
        "a list of at least one name": name in _NOT_EMPTY and value == [],
        "images to compare with": name == "references" and value is None,
        "a list of at least one seed": name == "seeds" and value == [],
        "a fraction up to 1, or a whole number of batches": number
        and ((name == "val_check_interval" and value <= 0) or (name in _BATCHES and _is_no_fraction(value))),
        "float32, float16 or bfloat16": name == "dtype" and value not in ("float32", "float16", "bfloat16"),
        "above 0, or -1 for all there are": name == "devices" and number and value == 0,
        "two numbers from 0 to below 1": name == "betas" and not (numbers and all(0 <= beta < 1 for beta in items)),
        "two numbers that rise within 0 to 1": name == "shares" and not (numbers and 0 <= items[0] <= items[1] <= 1),
        "min or max": name == "mode" and kind.endswith(("Stopping", "Checkpoint")) and value not in ("min", "max"),
        wanted: known and not (value is None or isinstance(value, Mapping) or in_range),
        f"at least {least}": not known and name not in _MAY_BE_NEGATIVE and type(value) is int and not in_range,
    }
    return next((needed for needed, is_so in useless.items() if is_so), None)


def _is_no_fraction(value: float) -> bool:
    return isinstance(value, float) and not 0 <= value <= 1


def _unfit(value: Any, hint: Any) -> list[str] | None:
    """Say what an annotation asks for (beside null); None if a value, or a node that makes an object, is that."""
    hint = hint.__bound__ if isinstance(hint, TypeVar) else get_args(hint)[0] if get_origin(hint) is Annotated else hint
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
        plain = [item for item in value.values() if not isinstance(item, Mapping)] if isinstance(value, Mapping) else []
        fits = isinstance(value, Mapping) and all(_unfit(item, inner[1]) is None for item in plain if inner)
        found = [_unfit(item, inner[1]) for item in plain] if inner else []
        each = next((f", each {' or '.join(words)}" for words in found if words), "")
        words = [f"named values, {{a: 1}}{each}"]
    elif issubclass(kind, Iterable):
        several = origin is tuple and Ellipsis not in inner
        fits = isinstance(value, list) and (not several or len(value) == len(inner))
        fits = fits or (isinstance(value, Mapping) and not issubclass(kind, Sequence))
        if isinstance(value, list):
            hints = inner if several else inner[:1] * len(value)
            fits = fits and all(_unfit(item, each) is None for item, each in zip(value, hints, strict=False))
        example = "" if isinstance(value, list | None) else f", [{value}]"
        found = [_unfit(item, inner[0]) for item in value] if isinstance(value, list) and inner and not several else []
        each = next((f", each {' or '.join(words)}" for words in found if words), "")
        words = [f"a list{f' of {len(inner)}' if several else ''}{each or example}"]
    else:
        made = kind.__module__.partition(".")[0] in _MADE
        fits = isinstance(value, str | Mapping) and not made
        words = [f"a node with _target_, {kind.__name__}"]
    return None if fits else words


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and any(isinstance(each, Mapping) for each in value.values()):
        return "settings alone"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
