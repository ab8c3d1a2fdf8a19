"""Rendered images with a true caption and a minimally altered one: what PARM learns from before any rollout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np

from datamodules.prompt_templates import NUMBERS, Metadata, change_clause, make_row
from datamodules.shapes.prompts import CLASSES, prompt_pool
from datamodules.shapes.scenes import Scene, ShapesStream, names_only
from datamodules.shapes.world import SIZE
from lightning_modules.backbone.text import word_spans
from lightning_modules.rewards.geneval_metadata import ANYTHING, COLORS, RELATIONS
from lightning_modules.rewards.geneval_rules import Detections, GenEvalRules, Verdict
from lightning_modules.rewards.grounding import grounding

Change = Literal["class", "color", "relation", "count", "order"]
CHANGES: tuple[Change, ...] = get_args(Change)
_RULES = GenEvalRules(class_names=(*CLASSES, ANYTHING))


def truth(scene: Scene) -> Detections:
    """Return what a perfect detector finds in a rendered scene."""
    objects = scene.objects
    classes, scores = [item.name for item in objects], np.ones(len(objects), np.float32)
    boxes = np.array([item.box for item in objects], np.float32).reshape(-1, 4)
    return Detections(classes, scores, boxes, lambda indices: [objects[i].color for i in indices])


def judge(found: Detections, row: Metadata) -> Verdict:
    """Judge what is in an image by GenEval's rules; a "shape" in the prompt may be any one of the objects."""
    read, names = [found], found.classes
    if names and any(clause["class"] == ANYTHING for clause in row["include"]):
        read = [replace(found, classes=[*names[:i], ANYTHING, *names[i + 1 :]]) for i in range(len(names))]
    return max((_RULES.evaluate(row, each) for each in read), key=lambda verdict: verdict.correct)


def labels(found: Detections, row: Metadata, max_words: int, grid: int) -> tuple[Verdict, np.ndarray]:
    """Return GenEval's verdict on what is in an image, and the prompt's `grounding` in it."""
    words = word_spans(row["prompt"])
    return judge(found, row), grounding(row, found, CLASSES, _RULES.threshold, words, max_words, grid, SIZE)


def _changes(row: Metadata) -> Iterator[tuple[str, Metadata]]:
    """Give every prompt of the same task in which one thing is changed, after the name of that thing."""
    clauses = row["include"]
    for i, clause in enumerate(clauses):
        yield from (("class", change_clause(row, i, **{"class": name})) for name in CLASSES)
        if "color" in clause:
            yield from (("color", change_clause(row, i, color=color)) for color in COLORS)
        if "position" in clause:
            yield from (("relation", change_clause(row, i, position=[relation, 0])) for relation in RELATIONS)
    if row["tag"] == "counting":
        yield from (("count", change_clause(row, 0, count=count)) for count in NUMBERS)
    if row["tag"] in ("position", "color_attr"):
        swapped = [own | {"class": other["class"]} for own, other in zip(clauses, clauses[::-1], strict=True)]
        yield "order", make_row(row["tag"], *swapped)


@cache
def _train_prompts() -> frozenset[str]:
    """Return the training prompts, and what `vague` makes of those with colours or two classes."""
    rows = [row for pool in prompt_pool("train").values() for row in pool]
    vague = (
        change_clause(row, i, **{"class": ANYTHING}, **({"color": color} if "color" in clause else {}))
        for row in rows
        if row["tag"] not in ("single_object", "counting")
        for i, clause in enumerate(row["include"])
        for color in COLORS
    )
    return frozenset(row["prompt"] for row in (*rows, *vague))


def altered(row: Metadata, stream: ShapesStream, changes: Sequence[Change], rng: np.random.Generator) -> Metadata:
    """Return a prompt with another class, colour, count or relation, or with its objects in another order.

    From a training prompt it makes another one, never a held-out one, and it names no relation that the stream does
    not. The kind of change is drawn first, then the change: relations have fewer alternatives than classes and matter
    as much. Of a prompt that allows none of `changes` it makes any other change.
    """
    kinds: dict[str, list[Metadata]] = {}
    for kind, other in _changes(row):
        known = stream.split != "train" or other["prompt"] in _train_prompts()
        if other["prompt"] != row["prompt"] and known and names_only(other, stream.relations):
            kinds.setdefault(kind, []).append(other)
    wanted = [kinds[kind] for kind in kinds if kind in changes] or list(kinds.values())
    options = wanted[rng.integers(len(wanted))]
    return options[rng.integers(len(options))]


@dataclass(frozen=True)
class CaptionPair:
    """A rendered image (uint8 [64, 64, 3]) with two captions, GenEval's verdict on each, and the grounding of each."""

    image: np.ndarray
    captions: tuple[Metadata, Metadata]
    verdicts: tuple[Verdict, Verdict]
    grounding: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CaptionPairs:
    """Endless caption pairs: `pairs[index]` is a function of its fields and the index. Altered captions may be true."""

    stream: ShapesStream
    max_words: int  # of the longest prompt
    grid: int  # image tokens along each side
    changes: Sequence[Change] = CHANGES  # kinds from which the altered caption's is drawn, if its prompt allows one

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", tuple(self.changes))  # OmegaConf's lists are slow
        if not self.changes or not {*self.changes} <= {*CHANGES}:
            raise ValueError(f"changes must be some of {', '.join(CHANGES)}, not {list(self.changes)}")

    def __getitem__(self, index: int) -> CaptionPair:
        sample = self.stream[index]
        rng = np.random.Generator(np.random.Philox(key=np.array([self.stream.seed + 2**32, index], np.uint64)))
        captions = (sample.metadata, altered(sample.metadata, self.stream, self.changes, rng))
        true, other = (labels(truth(sample.scene), row, self.max_words, self.grid) for row in captions)
        return CaptionPair(sample.image, captions, (true[0], other[0]), (true[1], other[1]))
