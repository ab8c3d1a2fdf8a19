"""Prompts about COCO's 80 classes in GenEval's format: the official 553, and others to train and validate on.

No two splits name the same class-colour pair, unordered class pair (task `two_object`), class-relation-class triple or
count of a class. `single_object` is for evaluation alone: the official prompts name all 80 classes.
"""

import random
from collections.abc import Hashable, Iterable
from functools import cache
from itertools import combinations, product

from datamodules.prompt_templates import NUMBERS, Metadata, Split, by_task, check_split, clause, make_row, position
from lightning_modules.files import BUNDLED
from lightning_modules.jsonl import read_jsonl
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, COLORS, RELATIONS

OFFICIAL_FILE = BUNDLED / "geneval_prompts" / "prompts.jsonl"
_VALIDATION = {"color": 60, "pair": 300, "triple": 2400, "count": 30}  # combinations that validation keeps to itself
_PARTNERS = 40  # coloured objects that each one is combined with; 18,000 of 200,000 combinations are enough


@cache
def official_prompts() -> tuple[Metadata, ...]:
    """Return the 553 prompts of the benchmark, in their order."""
    return tuple(row for _, row in read_jsonl(OFFICIAL_FILE))


def _combinations(row: Metadata) -> Iterable[tuple[str, Hashable]]:
    """Give what a prompt names, by kind: class-colour pairs, a class pair, a triple, a count of a class."""
    clauses = row["include"]
    names = [clause["class"] for clause in clauses]
    yield from (("color", (clause["class"], clause["color"])) for clause in clauses if "color" in clause)
    match row["tag"]:
        case "two_object":
            yield "pair", frozenset(names)
        case "position":
            yield "triple", (names[1], clauses[1]["position"][0], names[0])
        case "counting":
            yield "count", (names[0], clauses[0]["count"])


@cache
def prompt_pool(split: Split) -> dict[str, list[Metadata]]:
    """Return all prompts of a split by task, the official ones in their order, others in a fixed random one."""
    check_split(split)
    if split == "evaluation":
        return by_task(official_prompts())
    held_out = {combination for row in official_prompts() for combination in _combinations(row)}

    def own(kind: str, items: Iterable[tuple]) -> list[tuple]:
        """Return the combinations of a kind that belong to the split; the same in every process."""
        key = frozenset if kind == "pair" else tuple
        free = [item for item in items if (kind, key(item)) not in held_out]
        random.Random(f"coco {kind}").shuffle(free)
        count = _VALIDATION[kind]
        return free[:count] if split == "validation" else free[count:]

    colored = own("color", product((name for name in CLASS_NAMES if name != "person"), COLORS))
    triples = ((a, relation, b) for a, relation, b in product(CLASS_NAMES, RELATIONS, CLASS_NAMES) if a != b)
    partners = ((a, b) for i, a in enumerate(colored) for b in (colored[i + 1 :] + colored[:i])[:_PARTNERS])
    pool = {
        "two_object": [
            make_row("two_object", *map(clause, names))
            for pair in own("pair", combinations(CLASS_NAMES, 2))
            for names in (pair, pair[::-1])
        ],
        "counting": [
            make_row("counting", clause(name, count=n)) for name, n in own("count", product(CLASS_NAMES, NUMBERS))
        ],
        "colors": [make_row("colors", clause(*pair)) for pair in colored],
        "position": [position(*triple) for triple in own("triple", triples)],
        "color_attr": [
            make_row("color_attr", clause(*a), clause(*b)) for a, b in partners if a[0] != b[0] and a[1] != b[1]
        ],
    }
    for task, prompts in pool.items():
        random.Random(f"coco order {task}").shuffle(prompts)
    return pool
