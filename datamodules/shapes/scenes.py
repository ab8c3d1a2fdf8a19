"""From a prompt to a scene that fulfils it, and the endless deterministic stream of captioned images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from datamodules.prompt_templates import Metadata, Split, change_clause
from datamodules.shapes.prompts import CLASSES, prompt_pool
from datamodules.shapes.world import BACKGROUNDS, RADII, Scene, SceneObject, place, render
from lightning_modules.cache_key import Keyed, fields_key
from lightning_modules.rewards.geneval_metadata import ANYTHING, COLORS, RELATIONS, TASKS, Relation

_DIRECTION = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign of the offset
_WEIGHTS = {"single_object": 0.5, "two_object": 1, "counting": 2, "colors": 4, "position": 3, "color_attr": 4}


def scene_for(metadata: Metadata, rng: np.random.Generator) -> Scene:
    """Draw a scene of exactly the objects that a prompt asks for; the objects of one clause share a colour.

    A relation holds along the axis on which the objects are further apart.
    """
    wanted: list[tuple[str, str]] = []
    direction: tuple[int, int] | None = None
    for clause in metadata["include"]:
        color = clause.get("color") or COLORS[rng.integers(len(COLORS))]
        name = clause["class"] if clause["class"] != ANYTHING else CLASSES[rng.integers(len(CLASSES))]
        wanted += [(name, color)] * clause["count"]
        if "position" in clause:
            direction = _DIRECTION[clause["position"][0]]
    radii = [RADII[0]] * len(wanted) if len(wanted) > 2 else [int(r) for r in rng.choice(RADII, len(wanted))]

    def related(centres: np.ndarray) -> np.ndarray:
        """Tell where the second object is in the wanted direction of the first, bool [TRIES]."""
        assert direction is not None
        axis, sign = direction
        offset = centres[:, 1] - centres[:, 0]
        return (sign * offset[:, axis] > 0) & (abs(offset[:, axis]) > abs(offset[:, 1 - axis]))

    centres = place(rng, radii, related if direction else None)
    objects = tuple(
        SceneObject(name, color, int(x), int(y), radius)
        for (name, color), (x, y), radius in zip(wanted, centres, radii, strict=True)
    )
    return Scene(objects, int(rng.integers(len(BACKGROUNDS))))


def vague(row: Metadata, rng: np.random.Generator) -> Metadata:
    """Say "shape" for the class in one clause of a prompt, in a random colour if it names one."""
    color = COLORS[rng.integers(len(COLORS))]
    i = int(rng.integers(len(row["include"])))
    return change_clause(row, i, **{"class": ANYTHING}, **({"color": color} if "color" in row["include"][i] else {}))


def names_only(row: Metadata, relations: Sequence[Relation]) -> bool:
    """Tell whether a prompt names none but these relations."""
    return all(clause["position"][0] in relations for clause in row["include"] if "position" in clause)


@cache
def _pool(split: Split, task: str, relations: tuple[Relation, ...]) -> list[Metadata]:
    return [row for row in prompt_pool(split)[task] if names_only(row, relations)]


@dataclass(frozen=True)
class CaptionedImage:
    """An image (uint8 [64, 64, 3]) with the prompt that it fulfils and the scene it shows."""

    image: np.ndarray
    metadata: Metadata
    scene: Scene


@dataclass(frozen=True)
class ShapesStream(Keyed):
    """Endless captioned images: `stream[index]` is a function of its fields and the index alone.

    Vague prompts, in which one class is "shape", teach that colours and relations go with every class, not only with
    those that training names.
    """

    split: Split = "train"
    seed: int = 0
    task_weights: Mapping[str, float] = field(default_factory=_WEIGHTS.copy)  # how often each occurs, if it is named
    vagueness: Mapping[str, float] = field(default_factory=dict)  # by task, the fraction of vague prompts
    relations: Sequence[Relation] = RELATIONS  # those that prompts may name

    def __post_init__(self) -> None:
        object.__setattr__(self, "relations", tuple(self.relations))  # OmegaConf's lists are slow, and cannot be hashed
        if not self.relations or not {*self.relations} <= {*RELATIONS}:
            raise ValueError(f"relations must be some of {', '.join(RELATIONS)}, not {list(self.relations)}")
        if unknown := [task for task in (*self.task_weights, *self.vagueness) if task not in TASKS]:
            raise ValueError(f"task_weights and vagueness are of {', '.join(TASKS)}, not of {unknown[0]!r}")
        if min(self.task_weights.values(), default=0) < 0 or not sum(self.task_weights.values()):
            raise ValueError(f"task_weights must be at least 0, and one more than that, not {dict(self.task_weights)}")
        if not all(0 <= share <= 1 for share in self.vagueness.values()):
            raise ValueError(f"vagueness must be from 0 to 1, not {dict(self.vagueness)}")

    def cache_key(self) -> dict[str, Any]:
        """Its fields; tasks are drawn in the order of their weights."""
        return {**fields_key(self), "task_weights": [list(each) for each in self.task_weights.items()]}

    def __getitem__(self, index: int) -> CaptionedImage:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], np.uint64)))
        bounds = np.cumsum(list(self.task_weights.values()))
        task = list(self.task_weights)[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]
        pool = _pool(self.split, task, tuple(self.relations))
        metadata = pool[rng.integers(len(pool))]
        if task in self.vagueness and rng.random() < self.vagueness[task]:
            metadata = vague(metadata, rng)
        scene = scene_for(metadata, rng)
        return CaptionedImage(render(scene), metadata, scene)
