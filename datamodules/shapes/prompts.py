"""Prompts of the shapes world in GenEval's six tasks, templates and metadata format, and their splits.

Held out: the class-colour pairs named by evaluation (or validation) prompts of `colors` and `color_attr`, the unordered
class pairs of `two_object` and the class-relation-class triples of `position` are never named by a training prompt.
`single_object` and `counting` have only 8 and 24 possible prompts, so there all splits share them.
"""

import random
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import combinations, product
from typing import Any, Literal

from datamodules.shapes.world import CLASSES, PALETTE
from lightning_modules.rewards.geneval import RELATIONS
from lightning_modules.rewards.grounding import ANYTHING

Metadata = dict[str, Any]
Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")
COLORS = tuple(PALETTE)
NUMBERS = {2: "two", 3: "three", 4: "four"}

_HELD_OUT = {  # combinations a split keeps to itself, the rest is for training
    "color": {"validation": 6, "evaluation": 10},
    "pair": {"validation": 3, "evaluation": 6},
    "triple": {"validation": 24, "evaluation": 50},
}


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def single_object(name: str) -> Metadata:
    """'a photo of a NAME'."""
    include = [{"class": name, "count": 1}]
    return {"tag": "single_object", "include": include, "prompt": f"a photo of {_article(name)}"}


def two_object(first: str, second: str) -> Metadata:
    """'a photo of a FIRST and a SECOND'."""
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    prompt = f"a photo of {_article(first)} and {_article(second)}"
    return {"tag": "two_object", "include": include, "prompt": prompt}


def counting(name: str, count: int) -> Metadata:
    """'a photo of COUNT NAMEs', exactly that many."""
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {_plural(name)}",
    }


def colors(name: str, color: str) -> Metadata:
    """'a photo of a COLOR NAME'."""
    include = [{"class": name, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {_article(f'{color} {name}')}"}


def position(first: str, relation: str, second: str) -> Metadata:
    """'a photo of a FIRST RELATION a SECOND'; the target (SECOND) is include[0], as in GenEval."""
    include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    prompt = f"a photo of {_article(first)} {relation} {_article(second)}"
    return {"tag": "position", "include": include, "prompt": prompt}


def color_attr(first: tuple[str, str], second: tuple[str, str]) -> Metadata:
    """'a photo of a COLOR NAME and a COLOR NAME', each given as (class, colour)."""
    include = [{"class": name, "count": 1, "color": color} for name, color in (first, second)]
    a, b = (_article(f"{color} {name}") for name, color in (first, second))
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {a} and {b}"}


def with_clauses(row: Metadata, include: list[Metadata]) -> Metadata:
    """The prompt of the same task with other classes, colours or counts in its clauses."""
    names = [clause["class"] for clause in include]
    match row["tag"]:
        case "single_object":
            return single_object(names[0])
        case "two_object":
            return two_object(names[0], names[1])
        case "counting":
            return counting(names[0], include[0]["count"])
        case "colors":
            return colors(names[0], include[0]["color"])
        case "position":
            return position(names[1], include[1]["position"][0], names[0])
        case _:
            first, second = ((clause["class"], clause["color"]) for clause in include)
            return color_attr(first, second)


def _divide(kind: str, items: Iterable[Any], split: Split) -> list[Any]:
    """The part of all combinations of a kind that belongs to a split; the same in every process."""
    shuffled = list(items)
    random.Random(f"shapes {kind}").shuffle(shuffled)
    validation, evaluation = (_HELD_OUT[kind][name] for name in ("validation", "evaluation"))
    bounds = {
        "train": slice(0, -evaluation - validation),
        "validation": slice(-evaluation - validation, -evaluation),
        "evaluation": slice(-evaluation, None),
    }
    return shuffled[bounds[split]]


@cache
def prompt_pool(split: Split) -> dict[str, tuple[Metadata, ...]]:
    """All distinct prompts of a split, by task, in an order that is shuffled once and for all."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    pairs = _divide("pair", combinations(CLASSES, 2), split)
    colored = _divide("color", product(CLASSES, COLORS), split)
    triples = ((a, r, b) for a, r, b in product(CLASSES, RELATIONS, CLASSES) if a != b)
    different = [(a, b) for a, b in product(colored, colored) if a[0] != b[0] and a[1] != b[1]]
    pool = {
        "single_object": [single_object(name) for name in CLASSES],
        "two_object": [two_object(a, b) for pair in pairs for a, b in (pair, pair[::-1])],
        "counting": [counting(name, n) for name, n in product(CLASSES, NUMBERS)],
        "colors": [colors(name, color) for name, color in colored],
        "position": [position(*triple) for triple in _divide("triple", triples, split)],
        "color_attr": [color_attr(a, b) for a, b in different],
    }
    for task, prompts in pool.items():
        random.Random(f"order {task}").shuffle(prompts)
    return {task: tuple(prompts) for task, prompts in pool.items()}


def shapes_prompts(split: Split, per_task: int | Mapping[str, int] | None) -> list[Metadata]:
    """GenEval metadata for `per_task` prompts of each of the six tasks, or of those that it names, task after task.

    A task with fewer distinct prompts repeats them in turn: every row is decoded with its own seed. None is for all
    there are, each once.
    """
    pool = prompt_pool(split)
    if per_task is None:
        return [row for prompts in pool.values() for row in prompts]
    counts = per_task if isinstance(per_task, Mapping) else dict.fromkeys(pool, per_task)
    for task, count in counts.items():
        if task not in pool:
            raise ValueError(f"per_task names the task {task!r}; there are: {', '.join(pool)}")
        if count < 1:
            raise ValueError(f"per_task must be at least 1, not {count} ({task})")
    return [pool[task][i % len(pool[task])] for task, count in counts.items() for i in range(count)]


def vocabulary() -> list[str]:
    """Every word that a shapes prompt can contain, sorted."""
    words = {word for relation in RELATIONS for word in relation.split()}
    nouns = (*CLASSES, ANYTHING)
    words |= {"a", "an", "photo", "of", "and", *NUMBERS.values(), *nouns, *map(_plural, nouns), *COLORS}
    return sorted(words)
