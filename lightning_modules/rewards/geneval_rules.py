"""GenEval's rules: what a prompt may ask, which detections count, whether an image shows what is asked.

The behaviour is that of the official evaluation (github.com/djghosh13/geneval, arXiv 2310.11513), oddities
included, because scores are only comparable when the oddities agree. What finds the objects is not decided
here: any detector that fills in `Detections` can be judged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_modules.jsonl import read_jsonl

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLAUSES = ("object_1", "color_1", "object_2", "color_2", "relation", "exact_count")

# COCO's 80 classes in COCO's order, three of them under GenEval's own names (computer mouse, tv remote,
# computer keyboard): map a COCO detector's output by index, never by name.
CLASS_NAMES = tuple(
    re.split(
        r",\s+",
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
        stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
        backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
        baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon,
        bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
        potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
        cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
        hair drier, toothbrush""",
    )
)


def _unnamed(indices: Sequence[int]) -> list[str]:
    raise ValueError("prompts ask for colors, the detector does not name them, and geneval.reward.colors is null")


@dataclass(frozen=True)
class Detections:
    """The detections of one image, before any threshold, in the detector's order (it breaks ties)."""

    classes: Sequence[str]
    """[N] class names."""
    scores: NDArray[np.float32]
    """[N] confidences."""
    boxes: NDArray[np.float32]
    """[N, 4] corners (x1, y1, x2, y2) in pixels, y growing downwards."""
    colors: Callable[[Sequence[int]], list[str]] = _unnamed
    """Names the colours of the detections with these indices; asked only if a prompt wants a colour,
    because the answer may cost a network."""
    masks: Callable[[Sequence[int]], NDArray[np.bool_]] | None = None
    """The pixels of the detections with these indices, [n, H, W]; None from detectors that know boxes only."""


@dataclass(frozen=True)
class Verdict:
    """GenEval's judgement of one image."""

    correct: bool
    reason: str
    """One line per failed clause in the official wording, two relations in sorted order; "" when correct."""
    details: dict[str, list[list[float]]]
    """The objects kept: class -> [[x1, y1, x2, y2, score], ...], classes in list order, best score first."""
    strict: bool
    """Every include is met by exactly `count` objects of the class; excludes are ignored."""
    share: float
    """Of what the prompt asks, the share that is met, in [0, 1]: each include's objects, colour and relation, and
    the excludes, count once each. All is met where nothing is asked."""
    clauses: tuple[float, ...]
    """[6] in the order of `CLAUSES`: 1 met, 0 not met, NaN not asked. What is never reached because something
    before it failed (the colour of a missing object) is not met. `relation` is every relation asked,
    `exact_count` every exclude; objects and colours of a third include clause have no place."""


@dataclass(frozen=True)
class GenEvalRules:
    """The official scoring with its options under their official names."""

    class_names: Sequence[str] = CLASS_NAMES
    threshold: float = 0.3
    """Confidence that an object has to exceed."""
    counting_threshold: float = 0.9
    """Confidence that an object has to exceed in the task "counting"."""
    max_objects: int = 16
    """Objects kept per class, so a larger count can never be met."""
    max_overlap: float = 1.0
    """IoU from which the less confident of two boxes of a class is dropped; 1 keeps even exact duplicates."""
    position_threshold: float = 0.1
    """Share of the summed box sizes by which two centres must differ before the difference counts."""

    def colors_asked(self, metadata: Mapping[str, Any], detections: Detections) -> list[int]:
        """The detections whose colours `evaluate` will ask for, so that they can be named beforehand, in one pass."""
        kept = self._keep(metadata["tag"], detections)
        asked = [clause for clause in metadata.get("include", ()) if "color" in clause]
        groups = [kept.get(clause["class"], [])[: clause["count"]] for clause in asked]
        enough = [group for group, clause in zip(groups, asked, strict=True) if len(group) == clause["count"]]
        return sorted({index for group in enough for index in group})

    def evaluate(self, metadata: Mapping[str, Any], detections: Detections) -> Verdict:
        """Judge one image by its prompt's `tag`, `include` and `exclude`; nothing asked is correct.

        Raises:
            IndexError: a position refers to a clause that does not come earlier (see `validate_metadata`).
            KeyError: a detection above the threshold has a class that is not in `class_names`.
        """
        kept = self._keep(metadata["tag"], detections)
        reasons: list[str] = []
        exact = True
        labels: dict[str, bool] = {}
        groups: list[list[int] | None] = []  # what each include clause found, None where it failed
        for number, clause in enumerate(metadata.get("include", ()), start=1):
            found = kept.get(clause["class"], [])[: clause["count"]]
            met, reason = self._check(clause, found, groups, detections)
            groups.append(None if reason else found)
            reasons += [reason] if reason else []
            exact = exact and not reason and len(kept.get(clause["class"], [])) == clause["count"]
            labels |= {f"{part}_{number}": met[part] for part in ("object", "color") if part in met}
            if "relation" in met:
                labels["relation"] = labels.get("relation", True) and met["relation"]
        for clause in metadata.get("exclude", ()):
            name, count, present = clause["class"], clause["count"], len(kept.get(clause["class"], []))
            if present >= count:
                reasons.append(f"expected {name}<{count}, found {present}")
            labels["exact_count"] = labels.get("exact_count", True) and present < count
        rows = np.column_stack([detections.boxes, detections.scores]).tolist()
        return Verdict(
            correct=not reasons,
            reason="\n".join(reasons),
            details={name: [rows[index] for index in indices] for name, indices in kept.items()},
            strict=exact,
            share=sum(labels.values()) / len(labels) if labels else 1.0,
            clauses=tuple(float(labels.get(name, math.nan)) for name in CLAUSES),
        )

    def _keep(self, tag: str, detections: Detections) -> dict[str, list[int]]:
        """Indices of the detections that count, by class in list order, best first; no empty classes."""
        scores, boxes = np.asarray(detections.scores, dtype=np.float32), detections.boxes.tolist()
        # In float32 a score of 0.3 is not above a threshold of 0.3; as a Python float (0.30000001) it is.
        confident = scores > np.float32(self.counting_threshold if tag == "counting" else self.threshold)
        by_class: dict[str, list[int]] = {name: [] for name in self.class_names}
        # A stable ascending sort, reversed: among equal scores the later detection comes first.
        for index in np.argsort(scores, kind="stable")[::-1].tolist():
            if confident[index]:
                by_class[detections.classes[index]].append(index)
        kept: dict[str, list[int]] = {}
        for name, indices in by_class.items():
            # At max_overlap 1 nothing is suppressed, not even an exact duplicate, whose IoU is 1.
            # The cap comes before the suppression of overlaps, so suppressed boxes use up places.
            for i in indices[: self.max_objects]:
                better = kept.setdefault(name, [])
                if self.max_overlap >= 1 or all(overlap(boxes[i], boxes[j]) < self.max_overlap for j in better):
                    better.append(i)
        return kept

    def _check(
        self, clause: Mapping[str, Any], found: list[int], groups: list[list[int] | None], detections: Detections
    ) -> tuple[dict[str, bool], str]:
        """Check an include clause on `found`, the best `count` objects of its class.

        Returns which of object, color and relation are asked and met, and why the clause failed ("" if it
        passed). The first failure ends the check.
        """
        name, count = clause["class"], clause["count"]
        asked = {"object": True, "color": "color" in clause, "relation": "position" in clause}
        met = {part: False for part, wanted in asked.items() if wanted}

        if len(found) < count:
            return met, f"expected {name}>={count}, found {len(found)}"
        met["object"] = True

        if asked["color"]:
            color, seen = clause["color"], detections.colors(found)
            right = seen.count(color)
            if right < count:
                named = ", ".join(f"{seen.count(other)} {other}" for other in COLORS if other in seen)
                return met, f"expected {color} {name}>={count}, found {right} {color}; and {named}"
            met["color"] = True

        if asked["relation"]:
            relation, target = clause["position"]
            target_group = groups[target]
            if target_group is None:
                return met, f"no target for {name} to be {relation}"
            for i in found:
                for j in target_group:
                    seen_at = relations(detections.boxes[i], detections.boxes[j], self.position_threshold)
                    if relation not in seen_at:
                        joined = " and ".join(sorted(seen_at))
                        return met, f"expected {name} {relation} target, found {joined} target"
            met["relation"] = True
        return met, ""


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), end pixels included; 0 if both are empty.

    Sides are rounded to float32 like the detector's boxes, what follows is not: cases on the boundary depend on it.
    """

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        width, height = np.float32(x2 - x1).item(), np.float32(y2 - y1).item()
        return max(width + 1, 0) * max(height + 1, 0)

    starts, ends = map(max, box[:2], other[:2]), map(min, box[2:], other[2:])
    shared = area(*starts, *ends)
    union = area(*box) + area(*other) - shared
    return shared / union if union else 0.0


def relations(box: NDArray[np.float32], target: NDArray[np.float32], position_threshold: float = 0.1) -> set[str]:
    """The relations of `box` to `target`, both [4] (x1, y1, x2, y2): none, one or two of `RELATIONS`.

    Along each axis the offset of the centres is shortened by `position_threshold` times the summed box sizes;
    a relation holds when more than half the length of the whole offset is left. In float32 like the
    detector's boxes: cases on the boundary depend on it.
    """
    corners = np.stack([box, target]).astype(np.float32).reshape(2, 2, 2)  # [box, corner, axis]
    center = corners.mean(axis=1)
    size = np.abs(corners[:, 1] - corners[:, 0])
    offset = center[0] - center[1]
    margin = np.float32(position_threshold) * (size[0] + size[1])
    clear = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if np.all(np.abs(clear) < np.float32(1e-3)):
        return set()
    x, y = clear / np.linalg.norm(offset)
    # Image rows grow downwards, so above is the negative direction.
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def read_prompts(path: str | Path, class_names: Sequence[str] = CLASS_NAMES) -> list[dict[str, Any]]:
    """Read prompts in GenEval's format, one JSON object a line, and validate them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no prompts or a broken one; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of GenEval prompts")
    rows = []
    for place, row in read_jsonl(path):
        validate_metadata(row, class_names, place)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file has no prompts")
    return rows


def validate_metadata(row: Any, class_names: Sequence[str], place: str) -> None:
    """Refuse a prompt that `GenEvalRules` cannot judge, or would judge otherwise than its author meant.

    Raises:
        ValueError: one sentence that begins with `place` ("file:line") and says what is wrong.
    """
    if complaint := _complaint(row, class_names):
        raise ValueError(f"{place}: {complaint}")


def _complaint(row: Any, class_names: Sequence[str]) -> str:
    """A sentence on what is wrong with a prompt, "" if nothing is."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {row!r}"
    if row.get("tag") not in TASKS:
        return f"unknown tag {row.get('tag')!r}, known are {', '.join(TASKS)}"
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return f"prompt must be a non-empty text, found {row.get('prompt')!r}"
    if not isinstance(row.get("include"), list) or not row["include"]:
        return f"include must be a non-empty list, found {row.get('include')!r}"
    if not isinstance(row.get("exclude", []), list):
        return f"exclude must be a list, found {row['exclude']!r}"
    for kind, keys in (("include", ("class", "count", "color", "position")), ("exclude", ("class", "count"))):
        for index, clause in enumerate(row.get(kind, [])):
            if found := _clause_complaint(clause, keys, index, class_names):
                return f"{kind}[{index}]: {found}"
    return ""


def _clause_complaint(clause: Any, keys: Sequence[str], index: int, class_names: Sequence[str]) -> str:
    if not isinstance(clause, dict):
        return f"expected an object, found {clause!r}"
    # The rules read known keys only, so a misspelt one would be ignored in silence.
    if unknown := [key for key in clause if key not in keys]:
        return f"unknown key {unknown[0]!r}, known are {', '.join(keys)}"
    if clause.get("class") not in class_names:
        known = ", ".join([*class_names[:8], *(["..."] if len(class_names) > 8 else [])])
        return f"unknown class {clause.get('class')!r}, known are {known}"
    if type(clause.get("count")) is not int or clause["count"] < 1:
        return f"count must be a whole number of at least 1, found {clause.get('count')!r}"
    if "color" in clause and clause["color"] not in COLORS:
        return f"unknown color {clause['color']!r}, known are {', '.join(COLORS)}"
    if "position" not in clause:
        return ""
    position = clause["position"]
    if not isinstance(position, list) or len(position) != 2:
        return f"position must be [relation, index of an earlier include], found {position!r}"
    if position[0] not in RELATIONS:
        return f"unknown relation {position[0]!r}, known are {', '.join(RELATIONS)}"
    if type(position[1]) is not int or not 0 <= position[1] < index:
        return f"position must refer to an earlier include by its index, found {position[1]!r}"
    return ""
