"""GenEval's rules: which detections count, whether an image shows what a prompt asks.

The behaviour, oddities included, is that of the official evaluation (github.com/djghosh13/geneval, arXiv 2310.11513):
scores are only comparable when the oddities agree. Any detector that fills in `Detections` can be judged.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, COLORS

CLAUSES = ("object_1", "color_1", "object_2", "color_2", "relation", "exact_count")


def _unnamed(indices: Sequence[int]) -> list[str]:
    raise ValueError("prompts ask for colors, the detector does not name them, and geneval.reward.colors is null")


@dataclass(frozen=True)
class Detections:
    """The detections of one image, before any threshold, in the detector's order (it breaks ties)."""

    classes: Sequence[str]  # [N]
    scores: NDArray[np.float32]  # [N]
    boxes: NDArray[np.float32]  # [N, 4], corners (x1, y1, x2, y2) in pixels, y growing downwards
    # Names the colours of the detections with these indices; asked only if a prompt wants one: it may cost a network.
    colors: Callable[[Sequence[int]], list[str]] = _unnamed
    # The pixels of the detections with these indices, [n, H, W]; None from detectors that know boxes only.
    masks: Callable[[Sequence[int]], NDArray[np.bool_]] | None = None


@dataclass(frozen=True)
class Verdict:
    """GenEval's judgement of one image."""

    correct: bool
    reason: str  # one line per failed clause in the official wording, two relations in sorted order; "" when correct
    details: dict[str, list[list[float]]]  # objects kept: class -> [[x1, y1, x2, y2, score], ...], best score first
    strict: bool  # every include is met by exactly `count` objects of the class; excludes are ignored
    # The share of what is asked that is met, in [0, 1]; 1 if nothing is. Each include's objects and its colour count
    # once, so do all relations together, and all excludes.
    share: float
    # [6] in the order of `CLAUSES`: 1 met, 0 not met, NaN not asked. What is not reached because something before it
    # failed (the colour of a missing object) is not met. `relation` is every relation asked, `exact_count` every
    # exclude; objects and colours of a third include have no place.
    clauses: tuple[float, ...]


@dataclass(frozen=True)
class GenEvalRules:
    """The official scoring with its options under their official names."""

    class_names: Sequence[str] = CLASS_NAMES
    threshold: float = 0.3  # confidence that an object has to exceed
    counting_threshold: float = 0.9  # the same in the task "counting"
    max_objects: int = 16  # kept per class, so a larger count can never be met
    max_overlap: float = 1.0  # IoU from which the less confident of two boxes of a class is dropped; 1 drops none
    position_threshold: float = 0.1  # share of the summed box sizes by which two centres must differ for it to count

    @classmethod
    def with_options(cls, class_names: Sequence[str], options: Mapping[str, Any]) -> Self:
        """Return rules with those of `geneval.reward.options`; raises ValueError for a wrong one."""
        known = [field.name for field in fields(cls) if field.name != "class_names"]
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"geneval.reward.options: unknown option {name!r}, known are {', '.join(known)}")
            if name == "max_objects":
                fits, wanted = type(value) is int and value >= 1, "a whole number of at least 1"
            else:
                fits, wanted = type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"
            if not fits:
                raise ValueError(f"geneval.reward.options.{name} must be {wanted}, not {value!r}")
        return cls(class_names, **options)

    def colors_asked(self, metadata: Mapping[str, Any], detections: Detections) -> list[int]:
        """Indices of the detections whose colours `evaluate` will ask for, to be named beforehand in one pass."""
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
        """Check an include clause on `found`, the best `count` objects of its class, up to the first failure.

        Returns which of object, color and relation are asked and met, and why the clause failed ("" if it passed).
        """
        name, count = clause["class"], clause["count"]
        keys = {"object": "class", "color": "color", "relation": "position"}
        met = {part: False for part, key in keys.items() if key in clause}
        if len(found) < count:
            return met, f"expected {name}>={count}, found {len(found)}"
        met["object"] = True
        if "color" in clause:
            color, seen = clause["color"], detections.colors(found)
            right = seen.count(color)
            if right < count:
                named = ", ".join(f"{seen.count(other)} {other}" for other in COLORS if other in seen)
                return met, f"expected {color} {name}>={count}, found {right} {color}; and {named}"
            met["color"] = True
        if "position" in clause:
            relation, target = clause["position"]
            targets = groups[target]
            if targets is None:
                return met, f"no target for {name} to be {relation}"
            for i, j in product(found, targets):
                seen_at = relations(detections.boxes[i], detections.boxes[j], self.position_threshold)
                if relation not in seen_at:
                    return met, f"expected {name} {relation} target, found {' and '.join(sorted(seen_at))} target"
            met["relation"] = True
        return met, ""


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), end pixels included; 0 if both are empty."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        # Sides are rounded to float32, what follows is not: cases on the boundary depend on it.
        width, height = np.float32(x2 - x1).item(), np.float32(y2 - y1).item()
        return max(width + 1, 0) * max(height + 1, 0)

    starts, ends = map(max, box[:2], other[:2]), map(min, box[2:], other[2:])
    shared = area(*starts, *ends)
    union = area(*box) + area(*other) - shared
    return shared / union if union else 0.0


def relations(box: NDArray[np.float32], target: NDArray[np.float32], position_threshold: float = 0.1) -> set[str]:
    """The relations of `box` to `target`, both [4] (x1, y1, x2, y2): none, one or two of `RELATIONS`.

    Along each axis the offset of the centres is shortened by `position_threshold` times the summed box sizes; a
    relation holds when more than half the length of the whole offset is left. Cases on the boundary depend on float32.
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
