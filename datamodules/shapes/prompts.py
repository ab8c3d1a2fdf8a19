"""Prompts of the shapes world in GenEval's six tasks and format, and their splits.

No two splits name the same class-colour pair (in `colors` and `color_attr`), unordered class pair (`two_object`) or
class-relation-class triple (`position`). They share the 8 prompts of `single_object` and the 24 of `counting`.
"""

import random
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import combinations, product
from typing import Any

from datamodules.prompt_templates import NUMBERS, Metadata, Split, check_split, clause, make_row, pick, plural, position
from lightning_modules.rewards.geneval_metadata import ANYTHING, COLORS, RELATIONS

CLASSES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")

# Combinations that validation keeps to itself, and evaluation; the rest is for training.
_HELD_OUT = {"color": (6, 10), "pair": (3, 6), "triple": (24, 50)}


def _divide(kind: str, items: Iterable[Any], split: Split) -> list[Any]:
    """Return the combinations of a kind that belong to a split; the same in every process."""
    shuffled = list(items)
    random.Random(f"shapes {kind}").shuffle(shuffled)
    validation, evaluation = _HELD_OUT[kind]
    first, last = -validation - evaluation, -evaluation
    return {"train": shuffled[:first], "validation": shuffled[first:last], "evaluation": shuffled[last:]}[split]


@cache
def prompt_pool(split: Split) -> dict[str, list[Metadata]]:
    """Return all distinct prompts of a split, by task, in an order that is shuffled once and for all."""
    check_split(split)
    pairs = _divide("pair", combinations(CLASSES, 2), split)
    colored = _divide("color", product(CLASSES, COLORS), split)
    triples = ((a, r, b) for a, r, b in product(CLASSES, RELATIONS, CLASSES) if a != b)
    different = [(a, b) for a, b in product(colored, colored) if a[0] != b[0] and a[1] != b[1]]
    pool = {
        "single_object": [make_row("single_object", clause(name)) for name in CLASSES],
        "two_object": [make_row("two_object", clause(a), clause(b)) for pair in pairs for a, b in (pair, pair[::-1])],
        "counting": [make_row("counting", clause(name, count=n)) for name, n in product(CLASSES, NUMBERS)],
        "colors": [make_row("colors", clause(*pair)) for pair in colored],
        "position": [position(*triple) for triple in _divide("triple", triples, split)],
        "color_attr": [make_row("color_attr", clause(*a), clause(*b)) for a, b in different],
    }
    for task, prompts in pool.items():
        random.Random(f"order {task}").shuffle(prompts)
    return pool


def shapes_prompts(split: Split, per_task: int | Mapping[str, int] | None) -> list[Metadata]:
    """Return prompts about shapes; see `pick`."""
    return pick(prompt_pool(split), per_task)


def vocabulary() -> list[str]:
    """Return every word that a shapes prompt can contain, sorted."""
    words = {word for relation in RELATIONS for word in relation.split()}
    nouns = (*CLASSES, ANYTHING)
    words |= {"a", "an", "photo", "of", "and", *NUMBERS.values(), *nouns, *map(plural, nouns), *COLORS}
    return sorted(words)
