"""GenEval's six tasks: what each asks for, and the sentence that says so (arXiv 2310.11513).

Articles and plurals are the official ones, oddities included: "a photo of two toothbrushs".
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Metadata = dict[str, Any]
Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")
PerTask = int | Mapping[str, int] | None  # prompts of each task, or of those that it names; None is for all
NUMBERS = {2: "two", 3: "three", 4: "four"}


def plural(noun: str) -> str:
    """Put a noun in the plural: with an s, or with es after an s."""
    return noun + ("es" if noun.endswith("s") else "s")


def clause(name: str, color: str | None = None, count: int = 1) -> Metadata:
    """Return a clause: `count` objects of a class, in one colour if it is given."""
    return {"class": name, "count": count, **({"color": color} if color else {})}


def _phrase(part: Metadata) -> str:
    """Say a clause: 'a NAME', 'an ORANGE NAME', 'two NAMEs'."""
    if part["count"] > 1:
        return f"{NUMBERS[part['count']]} {plural(part['class'])}"
    noun = f"{part['color']} {part['class']}" if "color" in part else part["class"]
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_row(task: str, *include: Metadata) -> Metadata:
    """Return GenEval metadata of a task, with the sentence for its clauses; `counting` excludes one object more."""
    phrases = [_phrase(part) for part in include]
    joined = " and ".join(phrases)
    if task == "position":  # the second object is seen from the first: "a SECOND left of a FIRST"
        joined = f"{phrases[1]} {include[1]['position'][0]} {phrases[0]}"
    surplus = [part | {"count": part["count"] + 1} for part in include]
    exclude = {"exclude": surplus} if task == "counting" else {}
    return {"tag": task, "include": list(include), **exclude, "prompt": f"a photo of {joined}"}


def position(name: str, relation: str, target: str) -> Metadata:
    """Return GenEval metadata for 'a photo of a NAME RELATION a TARGET'."""
    return make_row("position", clause(target), clause(name) | {"position": [relation, 0]})


def change_clause(row: Metadata, index: int, **changes: Any) -> Metadata:
    """Return the prompt of the same task with other values in one of its clauses."""
    include = list(row["include"])
    include[index] = include[index] | changes
    return make_row(row["tag"], *include)


def pick(pool: Mapping[str, Sequence[Metadata]], per_task: PerTask) -> list[Metadata]:
    """Pick `per_task` prompts of each task in a pool, or of those that it names, task after task; None is for all.

    A task with fewer distinct prompts repeats them in turn: every row is decoded with its own seed.
    Raises ValueError for a task that the pool lacks, or a number below 1.
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


def by_task(rows: Sequence[Metadata]) -> dict[str, list[Metadata]]:
    """Sort prompts by their task, in the order in which tasks first occur."""
    return {task: [row for row in rows if row["tag"] == task] for task in dict.fromkeys(row["tag"] for row in rows)}


def check_split(split: str) -> None:
    """Raise ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
