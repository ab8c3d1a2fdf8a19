"""GenEval's six tasks: what each asks for, and the sentence that says so (arXiv 2310.11513).

Articles and plurals are the official ones, oddities included: "a photo of two toothbrushs".
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Metadata = dict[str, Any]
Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """The noun with an s, or with es after an s."""
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
        "prompt": f"a photo of {NUMBERS[count]} {plural(name)}",
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


def pick(pool: Mapping[str, Sequence[Metadata]], per_task: int | Mapping[str, int] | None) -> list[Metadata]:
    """`per_task` prompts of each task in a pool, or of those that it names, task after task; None is for all.

    A task with fewer distinct prompts repeats them in turn: every row is decoded with its own seed.

    Raises:
        ValueError: `per_task` names a task that the pool lacks, or a number below 1.
    """
    if per_task is None:
        return [row for prompts in pool.values() for row in prompts]
    counts = per_task if isinstance(per_task, Mapping) else dict.fromkeys(pool, per_task)
    for task, count in counts.items():
        if task not in pool:
            raise ValueError(f"per_task names the task {task!r}; there are: {', '.join(pool)}")
        if count < 1:
            raise ValueError(f"per_task must be at least 1, not {count} ({task})")
    return [pool[task][i % len(pool[task])] for task, count in counts.items() for i in range(count)]


def check_split(split: str) -> None:
    """Raise ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
