"""Verdicts as a person would say them, from GenEval's official reasons."""

import json
import re
from collections.abc import Mapping
from typing import Any

_TOO_FEW = re.compile(r"expected (?P<name>.+)>=(?P<count>\d+), found (?P<found>\d+)")
_TOO_MANY = re.compile(r"expected (?P<name>.+)<(?P<limit>\d+), found (?P<found>\d+)")
_COLOR = re.compile(r"expected (?P<color>\S+) (?P<name>.+)>=(?P<count>\d+), found (?P<found>\d+) \S+; and (?P<seen>.*)")
_RELATION = re.compile(r"expected (?P<name>.+) (?P<relation>(left|right) of|above|below) target, found (?P<seen>.*)")
_NO_TARGET = re.compile(r"no target for (?P<name>.+) to be (?P<relation>(left|right) of|above|below)")
_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}


def plain_verdict(row: Mapping[str, Any]) -> str:
    """Say what is wrong with an image, a line for each failed clause, or "correct".

    Args:
        row: of results.jsonl.
    """
    if row["correct"]:
        return "correct"
    metadata = json.loads(row["metadata"])
    reasons = row["reason"].splitlines()
    # That an object is missing says already that nothing can be left of it.
    own = [reason for reason in reasons if not _NO_TARGET.fullmatch(reason)] or reasons
    return "\n".join(_sentence(reason, metadata) for reason in own)


def _sentence(reason: str, metadata: Mapping[str, Any]) -> str:
    """Say one official reason plainly; one that is none of the official ones stays as it is."""
    if found := _COLOR.fullmatch(reason):
        return _wrong_color(found)
    if found := _TOO_FEW.fullmatch(reason):
        return _wrong_number(found["name"], int(found["count"]), int(found["found"]))
    if found := _TOO_MANY.fullmatch(reason):
        wanted = [clause["count"] for clause in metadata.get("include", ()) if clause["class"] == found["name"]]
        if found["limit"] == "1":
            return f"should have no {found['name']}, has {found['found']}"
        if sum(wanted) + 1 == int(found["limit"]):
            return _wrong_number(found["name"], sum(wanted), int(found["found"]))
        return f"needs fewer than {_amount(int(found['limit']), found['name'])}, has {found['found']}"
    if found := _RELATION.fullmatch(reason):
        target = _target(found["name"], found["relation"], metadata)
        if seen := found["seen"].removesuffix("target").strip():
            return f"{found['name']} is {seen} the {target}, should be {found['relation']} it"
        return f"{found['name']} is not clearly {found['relation']} the {target}"
    if found := _NO_TARGET.fullmatch(reason):
        target = _target(found["name"], found["relation"], metadata)
        return f"no {target} for the {found['name']} to be {found['relation']}"
    return reason


def _wrong_number(name: str, wanted: int, found: int) -> str:
    return f"needs {_amount(wanted, name)}, has {found or 'none'}"


def _wrong_color(found: re.Match[str]) -> str:
    if found["count"] == "1" and (seen := found["seen"].removeprefix("1 ")).isalpha():
        return f"{found['name']} should be {found['color']}, is {seen}"
    wanted = _amount(int(found["count"]), f"{found['color']} {found['name']}")
    own = [f"{found['found']} {found['color']}"] if found["found"] != "0" else []
    others = [seen for seen in found["seen"].split(", ") if not seen.endswith(f" {found['color']}")]
    return f"needs {wanted}, has {', '.join(own + others) or 'none'}"


def _amount(count: int, noun: str) -> str:
    """Write a number with its noun, in the plural where it is not one."""
    if count == 1:
        return f"1 {noun}"
    if noun in _PLURALS:
        return f"{count} {_PLURALS[noun]}"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'ch', 'sh', 'x')) else 's'}"


def _target(name: str, relation: str, metadata: Mapping[str, Any]) -> str:
    """Name the object that a clause relates to, or "other object" where the prompt does not say it."""
    clauses = metadata.get("include", ())
    for clause in clauses:
        if clause["class"] == name and (position := clause.get("position")) and position[0] == relation:
            return str(clauses[position[1]]["class"])
    return "other object"
