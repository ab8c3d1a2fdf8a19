"""Checks of the judges that a config names: there are such, and those that teach are not independent."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lightning_modules.backbone.published import nodes
from lightning_modules.runs.settings_tree import CONF
from lightning_modules.runs.signatures import constant, locate

_VERIFIERS = ("parm", "likelihood")  # that a run has of itself, most of them
_REWARD = "lightning_modules.rewards.geneval_reward.GenEvalReward"
_RULES = ("geneval", "strict", "clauses")  # and those that it has of GenEval


def refuse_same_names(overrides: Sequence[str]) -> None:
    """Raise ValueError for `judges=[A,B]` where both files of conf/judges add a judge of the same name."""
    chosen = [override.partition("=")[2].strip("[]") for override in overrides if override.startswith("judges=")]
    added: dict[str, str] = {}
    for file in [name.strip() for names in chosen for name in names.split(",")]:
        path = CONF / "judges" / f"{file}.yaml"
        for judge in map(str, OmegaConf.load(path) if path.is_file() else ()):
            if judge != "defaults" and added.setdefault(judge, file) != file:
                raise ValueError(f"judges={added[judge]} and judges={file} both add the judge {judge!r}: choose one")


def refuse_unlabelled(config: Mapping[str, Any]) -> None:
    """Raise ValueError if there is nothing to label images with, and some of them have to be."""
    if config["judges"].get("geneval") is not None:
        return
    data = config.get("data") or {}
    gives = constant(str(data.get("_target_")), "gives", None)
    made = gives == "rollouts" or (gives == "pairs" and constant(str(data["_target_"]), "makes_rollouts", True))
    if config["task"] == "score" or config["callbacks"].get("geneval") or made or gives == "groups":
        raise ValueError("judges.geneval is null, and what is made here is labelled by it")


def refuse_unknown_options(config: Mapping[str, Any]) -> None:
    """Raise ValueError for options that GenEval's rules do not have, or that are no numbers."""
    reward = config["geneval"].get("reward") or {}
    if reward.get("_target_") == _REWARD and (options := reward.get("options")):
        from lightning_modules.rewards.geneval_rules import GenEvalRules  # imports numpy

        GenEvalRules.with_options((), options)


def refuse_unknown_judges(config: Mapping[str, Any]) -> None:
    """Raise ValueError for names of judges that no run has and the config does not add."""
    decodes = config["task"] != "score"
    labels = config["judges"].get("geneval") is not None
    known = [
        *(_VERIFIERS if decodes else ()), *(_RULES if labels else ()), *(config["judges"].get("rewards") or ()),
    ]  # fmt: skip
    named: dict[str, Iterable[str]] = {
        "evaluator.independent_judges": config["evaluator"].get("independent_judges") or ()
    }
    data = (decodes and config.get("data")) or {}
    gives = constant(str(data.get("_target_")), "gives", None)  # data of yours may mean something else by these
    for name in {"groups": ("rewards", "independent_judges"), "pairs": ("scores",)}.get(gives, ()):
        named[f"data.{name}"] = data.get(name) or ()
    if gives == "groups":
        named["data.potentials"] = (data.get("potentials") or {}).values()
    for key, node in nodes(config["strategies"]) if decodes else ():
        strategy = f"strategies.{key.partition('.')[0]}"
        named[strategy] = [*named.get(strategy, ()), *_choosing(node)]
    for key, node in nodes(data, "data") if gives else ():
        named[key] = _choosing(node)
    for key, names in named.items():
        for name in names:
            if name not in known:
                raise ValueError(f"{key} names the judge {name!r}; there are: {', '.join(known)}")


def _choosing(node: Mapping[str, Any]) -> list[str]:
    """The judges that a strategy names; one of yours may mean something else."""
    if not str(node["_target_"]).startswith("lightning_modules.decoding."):
        return []
    return [value for name in ("judge", "verifier") if isinstance(value := node.get(name), str)]


def refuse_teaching_judges(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a judge that is trained, or decides what is trained on, counts as independent."""
    module, data = config["module"], config.get("data") or {}
    gives = constant(str(data.get("_target_")), "gives", None)
    weights = (data.get({"groups": "rewards", "pairs": "scores"}.get(gives, "")) or {}).items()
    teachers = {name for name, weight in weights if weight}
    if gives == "groups":
        teachers |= {name for _, node in nodes(data["spec"], "spec") for name in _choosing(node)}
        teachers |= {*(data.get("potentials") or {}).values()}
    trained = {"parm"} if gives == "rollouts" or module.get("refit") else set()
    if "parm" in teachers - trained and _is_untrained(config.get("parm")) and not _is_untrained(config["decoder"]):
        raise ValueError("parm.checkpoint is null: a PARM of random weights would decide what is trained on")
    for name in config["evaluator"].get("independent_judges") or ():
        if name in teachers | trained:
            said = "is trained" if name in trained else "decides what is trained on"
            raise ValueError(f"evaluator.independent_judges: {name!r} {said}")
    if gives == "groups":
        _refuse_teaching_in_groups(config, teachers)


def _is_untrained(node: Mapping[str, Any] | None) -> bool:
    return node is not None and node.get("checkpoint", "") is None


def _refuse_teaching_in_groups(config: Mapping[str, Any], teachers: set[str]) -> None:
    data, rule = config["data"], config["callbacks"].get("divergence") or {}
    independent = data.get("independent_judges") or ()
    if both := teachers & {*independent}:
        raise ValueError(f"data.independent_judges names {min(both)!r}, a judge that has a say in what is trained on")
    rewards = {name for name, weight in (data.get("rewards") or {}).items() if weight}
    if missing := {*(data.get("potentials") or ())} - rewards:
        raise ValueError(f"data.potentials.{min(missing)}: data.rewards has no {min(missing)!r}")
    for name, by in (data.get("potentials") or {}).items():
        if _values_no_prefixes(by, config["judges"].get("rewards") or {}):
            raise ValueError(f"data.potentials.{name}: the judge {by!r} values no prefixes; parm and likelihood do")
    network = (config.get("decoder") or {}).get("module") or {}
    if data.get("potentials") and not constant(str(network.get("_target_")), "causal", True):
        raise ValueError("data.potentials are values of prefixes, and only next-token decoders decide these")
    read = str(rule.get("reward") or "")
    if read.startswith("train/reward/") and read.split("/")[2] not in rewards:
        raise ValueError(f"callbacks.divergence.reward is {read}, and data.rewards has no {read.split('/')[2]!r}")
    read = str(rule.get("independent") or "")
    if read.startswith("train/independent/") and read.rpartition("/")[2] not in independent:
        said = f"data.independent_judges does not name {read.rpartition('/')[2]!r}"
        out = "~callbacks.divergence leaves this rule out"
        raise ValueError(f"callbacks.divergence.independent is {read}, and {said}; {out}")


def _values_no_prefixes(judge: str, rewards: Mapping[str, Any]) -> bool:
    """Say if a judge surely values finished images alone; classes of yours may say what they can in other ways."""
    found = locate(str((rewards.get(judge) or {}).get("_target_")))
    abilities = found and found.inner("abilities")
    is_ours = abilities is not None and abilities.module.startswith("lightning_modules.")
    return judge in _RULES or (is_ours and "PREFIXES" not in ast.dump(abilities.node))  # type: ignore[union-attr]
