"""Rendered images with their true caption and a minimally altered one: what PARM learns from before any rollout."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from datamodules.shapes.prompts import (
    COLORS,
    NUMBERS,
    RELATIONS,
    Metadata,
    Split,
    color_attr,
    colors,
    counting,
    position,
    prompt_pool,
    single_object,
    two_object,
)
from datamodules.shapes.scenes import Scene, ShapesStream
from datamodules.shapes.world import CLASSES
from lightning_modules.rewards.geneval import Detections, GenEvalRules, Verdict

_RULES = GenEvalRules(class_names=CLASSES)


def truth(scene: Scene) -> Detections:
    """What a perfect detector would find in a rendered scene."""
    objects = scene.objects
    return Detections(
        classes=[item.name for item in objects],
        scores=np.ones(len(objects), np.float32),
        boxes=np.array([item.box for item in objects], np.float32).reshape(-1, 4),
        colors=lambda indices: [objects[i].color for i in indices],
    )


def _changes(row: Metadata) -> Iterator[tuple[str, Metadata]]:
    """Every prompt of the same task with one thing changed, and what was changed."""
    clauses = row["include"]
    names = [clause["class"] for clause in clauses]
    match row["tag"]:
        case "single_object":
            yield from (("class", single_object(name)) for name in CLASSES)
        case "counting":
            yield from (("class", counting(name, clauses[0]["count"])) for name in CLASSES)
            yield from (("count", counting(names[0], count)) for count in NUMBERS)
        case "colors":
            yield from (("class", colors(name, clauses[0]["color"])) for name in CLASSES)
            yield from (("color", colors(names[0], color)) for color in COLORS)
        case "two_object":
            for name in CLASSES:
                yield "class", two_object(name, names[1])
                yield "class", two_object(names[0], name)
        case "position":
            relation = clauses[1]["position"][0]
            yield "order", position(names[0], relation, names[1])
            yield from (("relation", position(names[1], other, names[0])) for other in RELATIONS)
            for name in CLASSES:
                yield "class", position(name, relation, names[0])
                yield "class", position(names[1], relation, name)
        case "color_attr":
            (a, b), (x, y) = names, (clause["color"] for clause in clauses)
            yield "order", color_attr((a, y), (b, x))
            for color in COLORS:
                yield "color", color_attr((a, color), (b, y))
                yield "color", color_attr((a, x), (b, color))
            for name in CLASSES:
                yield "class", color_attr((name, x), (b, y))
                yield "class", color_attr((a, x), (name, y))


@cache
def _train_prompts() -> frozenset[str]:
    return frozenset(row["prompt"] for rows in prompt_pool("train").values() for row in rows)


def altered(row: Metadata, split: Split, rng: np.random.Generator) -> Metadata:
    """A prompt with another class, colour, count or relation, or with its objects in another order.

    Beside a training prompt it is a training prompt too, so that training never names a held-out combination.
    What to change is drawn first, then how: relations have fewer alternatives than classes and matter as much.
    """
    kinds: dict[str, list[Metadata]] = {}
    for kind, other in _changes(row):
        if other["prompt"] != row["prompt"] and (split != "train" or other["prompt"] in _train_prompts()):
            kinds.setdefault(kind, []).append(other)
    options = list(kinds.values())[rng.integers(len(kinds))]
    return options[rng.integers(len(options))]


@dataclass(frozen=True)
class CaptionPair:
    """A rendered image (uint8 [64, 64, 3]) with two captions and the verdict of GenEval's rules on each."""

    image: np.ndarray
    captions: tuple[Metadata, Metadata]
    verdicts: tuple[Verdict, Verdict]


@dataclass(frozen=True)
class CaptionPairs:
    """Endless caption pairs: `pairs[index]` is a function of (stream, index) alone.

    The verdict on the altered caption comes from the rules, not from the assumption that it is false.
    """

    stream: ShapesStream

    def __getitem__(self, index: int) -> CaptionPair:
        sample = self.stream[index]
        rng = np.random.Generator(np.random.Philox(key=np.array([self.stream.seed + 2**32, index], np.uint64)))
        captions = (sample.metadata, altered(sample.metadata, self.stream.split, rng))
        found = truth(sample.scene)
        verdicts = (_RULES.evaluate(captions[0], found), _RULES.evaluate(captions[1], found))
        return CaptionPair(sample.image, captions, verdicts)
