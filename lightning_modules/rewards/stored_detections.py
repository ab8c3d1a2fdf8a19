"""Detections made elsewhere, by any detector, read from JSON lines."""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_modules.cache_key import Keyed, class_name
from lightning_modules.jsonl import read_jsonl
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, COLORS
from lightning_modules.rewards.geneval_rules import Detections

if TYPE_CHECKING:  # takes seconds, and rows are checked without it
    import torch


class StoredDetections(Keyed):
    """Looks up what another detector found in the images of a folder in GenEval's layout.

    One row an image: `{"filename": "00000/samples/0000.png", "detections": [{"class": "dog", "score": 0.9,
    "bbox": [x1, y1, x2, y2], "color": "red", "mask": {"size": [H, W], "counts": [...]}}, ...]}`, in the detector's
    order, before any threshold. Without a colour model prompts may need `color`; with one, it sees `mask` if there is
    one: COCO's uncompressed run lengths (column by column, background first).

    Args:
        path: a JSONL file, or a folder of them.
        class_names: the classes that prompts may name, in the order in which results list them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is broken, or an image occurs twice; the sentence names file and line.
    """

    image_size = None
    reads = ("path",)

    def __init__(self, path: str, class_names: Sequence[str] = CLASS_NAMES) -> None:
        self.path, self.class_names = Path(path), tuple(class_names)
        files = sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else [self.path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: there is no such JSONL file of detections, or folder of them")
        self._found: dict[str, Detections] = {}
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
            for place, row in read_jsonl(file):
                self._read(row, place)
        self.name = path
        self._sha256 = digest.hexdigest()[:16]

    def cache_key(self) -> dict[str, Any]:
        """The detections, wherever they lie, and the classes that prompts may name."""
        return {"class": class_name(self), "sha256": self._sha256, "class_names": list(self.class_names)}

    def to(self, device: "torch.device | str") -> Self:
        """Nothing is computed, so nothing is moved."""
        return self

    def of(self, files: Sequence[str] | None) -> list[Detections]:
        """Return the detections of files; raises ValueError if images have none or nothing is known of one."""
        if files is None:
            raise ValueError(f"{self.path}: detections made elsewhere can only judge files (task=score)")
        for name in files:
            if _key(name) not in self._found:
                raise ValueError(f"{self.path}: has no detections of {name}")
        return [self._found[_key(name)] for name in files]

    def _read(self, row: Any, place: str) -> None:
        try:
            key, objects = _key(row["filename"]), row["detections"]
            boxes = np.array([entry["bbox"] for entry in objects], np.float32).reshape(len(objects), 4)
            scores = np.array([entry["score"] for entry in objects], np.float32)
            classes = [entry["class"] for entry in objects]
            named = {entry.get("color", COLORS[0]) for entry in objects}
            unknown = set(classes) - set(self.class_names), named - set(COLORS)
        except KeyError as error:
            raise ValueError(f"{place}: not a row of detections: there is no {error.args[0]!r}") from error
        except (ValueError, TypeError) as error:
            wanted = "a list of objects, each with a class, a score (a number) and a bbox (four numbers)"
            raise ValueError(f"{place}: not a row of detections: they are {wanted}") from error
        if unknown[0]:
            raise ValueError(f"{place}: unknown class {min(map(str, unknown[0]))!r}")
        if unknown[1]:
            raise ValueError(f"{place}: unknown color {min(map(str, unknown[1]))!r}, known are {', '.join(COLORS)}")
        if not np.isfinite(scores).all() or not (np.rint(boxes[:, :2]) < np.rint(boxes[:, 2:])).all():
            raise ValueError(f"{place}: a box must be [x1, y1, x2, y2], at least a pixel, with a finite score")
        if key in self._found:
            raise ValueError(f"{place}: {row['filename']} occurs twice")
        masks = [entry.get("mask") for entry in objects]
        if any(masks) and not all(isinstance(mask, dict) and isinstance(mask.get("counts"), list) for mask in masks):
            raise ValueError(f"{place}: masks must be uncompressed run lengths, of all objects or of none")
        if not all(_adds_up(mask) for mask in masks if mask):
            raise ValueError(f"{place}: the run lengths of a mask do not add up to the pixels of its size")
        colors = partial(_colors, [entry.get("color") for entry in objects], place)
        self._found[key] = Detections(classes, scores, boxes, colors, partial(_masks, masks) if any(masks) else None)


def _key(name: str) -> str:
    """PROMPT/samples/IMAGE of a path; the folders above may be anywhere, and the kind of file is not what matters."""
    return str(PurePosixPath(*PurePosixPath(name).parts[-3:]).with_suffix(""))


def _colors(colors: Sequence[str | None], place: str, indices: Sequence[int]) -> list[str]:
    named = [colors[index] for index in indices]
    if None in named:
        raise ValueError(f"{place}: an object has no color, the prompt asks for it, and geneval.reward.colors is null")
    return [color for color in named if color is not None]


def _adds_up(mask: dict[str, Any]) -> bool:
    try:
        return sum(mask["counts"]) == math.prod(mask["size"])
    except (KeyError, TypeError):
        return False


def _masks(masks: Sequence[Any], indices: Sequence[int]) -> NDArray[np.bool_]:
    """Run lengths -> pixels [n, H, W]."""
    runs = [(masks[index]["size"], masks[index]["counts"]) for index in indices]
    flat = [np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]) for size, counts in runs]
    return np.stack(flat).transpose(0, 2, 1)
