"""Finds the objects of the shapes world in finished pictures, from pixels alone.

It judges decoders, so it shares nothing with the renderer: colours and shapes are this module's own, and what looks
like none of them gets a low score instead of the nearest name.

Each pixel is placed on the line from the background to one of ten colours, which tells its colour and how much of it is
covered; pixels of one colour that touch are a candidate; its coverage is compared with every class drawn at all sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise, product
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from lightning_modules.cache_key import Keyed, fields_key
from lightning_modules.rewards.geneval_rules import Detections

Floats = NDArray[np.float32]
Masks = NDArray[np.bool_]

SIDE = 64  # of the pictures, pixels
CLASSES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
REFERENCES = {  # what is commonly meant by these words, sRGB
    "red": (215, 25, 35), "orange": (245, 135, 15), "yellow": (245, 220, 45), "green": (40, 155, 60),
    "blue": (40, 75, 210), "purple": (125, 45, 165), "pink": (250, 140, 185), "brown": (110, 65, 35),
    "black": (20, 20, 20), "white": (250, 250, 250),
}  # fmt: skip
GREY, TINT = 170.0, 24.0  # each channel of a background is this grey, give or take the tint
FAINT = 36.0  # a pixel this close to the background is background, Euclidean sRGB distance
SPECK = 24  # pixels; the smallest object, a star, covers 70, so anything smaller is dirt
WINDOW = 32  # side of the window in which a candidate is compared, pixels
RADII = np.arange(7.0, 13.1, 0.5)  # sizes of the templates, pixels
SAMPLES = 6  # per pixel and direction, for drawing templates
SHIFTS = (-2, 0, 2)  # of a template in its window, in samples: a third of a pixel
BLEMISH = 0.15  # wrong coverage, averaged over 3x3 pixels, that blur and noise may cause anywhere
LIMIT, SPREAD = 0.27, 0.04  # the doubt that scores 0.5, and how fast scores fall around it
AROUND = np.ones((1, 3, 3), bool)  # a pixel and its eight neighbours in a stack of masks


def _star(x: Floats, y: Floats) -> Masks:
    """Inside a star folded into a tenth: a straight edge from the tip (1, 0) to a valley at 36 degrees."""
    tenth, distance = np.pi / 5, np.hypot(x, y)
    angle = abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    along, across = 0.41 * np.cos(tenth), 0.41 * np.sin(tenth)
    return np.asarray((1 - distance * np.cos(angle)) * across > distance * np.sin(angle) * (1 - along))


# Which points each class covers when its centre is the origin and its radius 1; y points down.
INSIDE: dict[str, Callable[[Floats, Floats], Masks]] = {
    "circle": lambda x, y: np.hypot(x, y) < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.92,
    "triangle": lambda x, y: (y < 0.9) & (abs(x) < 0.54 * (y + 0.95)),
    "star": _star,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.97),
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "ring": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.55),
    "heart": lambda x, y: (x / 0.84) ** 2 + ((0.07 - y) / 0.77 - 0.62 * abs(x)) ** 2 < 1,  # a sheared disc
}


@cache
def _templates() -> Floats:
    """Draw each class at all sizes and shifts, centroid mid-window: coverage [classes, drawings, pixels]."""
    grid = (np.arange(WINDOW * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES - WINDOW / 2
    unit = np.linspace(-1, 1, 400, dtype=np.float32)
    drawings = []
    for inside in INSIDE.values():
        centroid = unit[inside(*np.meshgrid(unit, unit)).nonzero()[0]].mean()  # on the axis of symmetry
        for radius in RADII:
            fine = inside(*np.meshgrid(grid / radius, grid / radius + centroid))
            for shift in product(SHIFTS, repeat=2):
                blocks = np.roll(fine, shift, (0, 1)).reshape(WINDOW, SAMPLES, WINDOW, SAMPLES)
                drawings.append(blocks.mean((1, 3), dtype=np.float32).ravel())
    return np.stack(drawings).reshape(len(INSIDE), -1, WINDOW**2)


@dataclass(frozen=True)
class ShapesDetector(Keyed):
    """Finds the objects of the shapes world, in reading order of their topmost pixels, with scores in [0, 1].

    A clean, slightly blurred or noisy shape scores above 0.9, half a shape, two fused or a blob far less.
    """

    class_names: ClassVar[tuple[str, ...]] = CLASSES
    image_size: ClassVar[int | None] = SIDE
    name: ClassVar[str] = "shapes"
    batch_size: int = field(default=128, compare=False)  # images looked at together: bounds memory, changes no result

    def cache_key(self) -> dict[str, Any]:
        """Its class, because no setting changes what it finds."""
        return fields_key(self)

    def to(self, device: object) -> Self:
        """It computes on the CPU, wherever it is moved."""
        return self

    def __call__(self, images: NDArray[np.uint8]) -> list[Detections]:
        """Detect the objects of images, uint8 [B, 64, 64, 3], or raise ValueError; boxes end at the last pixel + 1."""
        if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"the shapes detector needs uint8 images [B, {SIDE}, {SIDE}, 3], not {found}")
        starts = range(0, len(images), self.batch_size)
        return [found for start in starts for found in self._detect(images[start : start + self.batch_size])]

    def _detect(self, images: NDArray[np.uint8]) -> list[Detections]:
        backgrounds = _backgrounds(images)
        offsets = images - backgrounds[:, None, None]
        candidates = _find(_color_labels(offsets, backgrounds))
        deviations = _deviations(_coverage(offsets, candidates))
        best, second = np.partition(deviations, 1, axis=1)[:, :2].T
        doubts = best / np.sqrt(np.maximum(second, 1e-6))  # geometric mean of best and best / second
        scores = expit((LIMIT - doubts) / SPREAD).astype(np.float32)
        classes = [self.class_names[i] for i in deviations.argmin(1)]
        colors = [tuple(REFERENCES)[i] for i in candidates.color]
        bounds = np.searchsorted(candidates.image, np.arange(len(images) + 1))
        return [
            Detections(classes[a:b], scores[a:b], candidates.boxes[a:b], partial(_pick, colors[a:b]))
            for a, b in pairwise(bounds)
        ]


def _pick(names: Sequence[str], indices: Sequence[int]) -> list[str]:
    return [names[i] for i in indices]


def _backgrounds(images: NDArray[np.uint8]) -> Floats:
    """Return the median colour of each image, within what backgrounds can have, [B, 3]."""
    pixels = images[:, ::2, ::2].reshape(len(images), -1, 3)
    half = pixels.shape[1] // 2
    return np.clip(np.partition(pixels, half, axis=1)[:, half].astype(np.float32), GREY - TINT, GREY + TINT)


def _color_labels(offsets: Floats, backgrounds: Floats) -> NDArray[np.int8]:
    """Name the colour that covers most of each pixel, an index into `REFERENCES`, [B, H, W]; -1 is background.

    It is the colour whose line from the background passes closest, if the pixel lies on the far half of that line: so
    the rim of a red object is not pink. `offsets` are the pixels less their image's background, [B, H, W, 3].
    """
    labels = np.full(offsets.shape[:3], -1, np.int8)
    where = np.nonzero(np.einsum("bhwc,bhwc->bhw", offsets, offsets) > FAINT**2)
    lines = np.array(list(REFERENCES.values()), np.float32) - backgrounds[:, None]  # [B, colours, 3]
    squares = (lines**2).sum(-1)[where[0]]
    dots = np.einsum("nc,nkc->nk", offsets[where], lines[where[0]])
    cover = np.clip(dots / squares, 0, 1)
    best = (cover * (cover * squares - 2 * dots)).argmin(1)  # squared distance but for the pixel's own length
    labels[where] = np.where(cover[np.arange(len(best)), best] > 0.5, best, -1)
    return labels


def _components(labels: NDArray[np.int8]) -> NDArray[np.int32]:
    """Number regions of equal labels that touch, also by corners, in reading order, [B, H, W]; -1: none."""
    inside = labels >= 0
    numbers = np.full(labels.shape, -1, np.int32)
    numbers[inside] = np.arange(inside.sum())
    edges = []
    for row, left, right in ((1, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)):  # down, right, the two diagonals
        here = np.s_[:, : SIDE - row, left : SIDE - right]
        there = np.s_[:, row:, right : SIDE - left]
        joined = inside[here] & (labels[here] == labels[there])
        edges.append((numbers[here][joined], numbers[there][joined]))
    if inside.any():  # SciPy refuses an empty graph
        ends = np.concatenate(edges, axis=1)
        graph = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(inside.sum(),) * 2)
        numbers[inside] = connected_components(graph, directed=False)[1]
    return numbers


@dataclass(frozen=True)
class _Candidates:
    """N regions of one colour in a batch of images that may be objects."""

    numbers: NDArray[np.int32]  # [B, H, W], whose pixel it is, -1 nobody's
    image: NDArray[np.intp]  # [N], ascending
    color: NDArray[np.int8]  # [N], index into REFERENCES
    boxes: Floats  # [N, 4] as x1, y1, x2, y2
    corners: NDArray[np.intp]  # [N, 2], row and column where the window around the centroid begins, maybe < 0


def _find(labels: NDArray[np.int8]) -> _Candidates:
    """Gather the regions that are larger than a speck from the colours of all pixels, [B, H, W]."""
    numbers = _components(labels)
    areas = np.bincount(numbers[numbers >= 0])
    large = areas >= SPECK
    numbers = np.append(np.where(large, np.cumsum(large) - 1, -1), -1).astype(np.int32)[numbers]
    owner = numbers[numbers >= 0]
    order = np.argsort(owner, kind="stable")
    image, row, column = (index[order] for index in np.nonzero(numbers >= 0))
    areas = areas[large]
    first = np.cumsum(areas) - areas  # of each candidate's pixels
    low = [np.minimum.reduceat(index, first) for index in (column, row)]
    high = [np.maximum.reduceat(index, first) + 1 for index in (column, row)]
    middles = [np.add.reduceat(index, first) / areas + 0.5 for index in (row, column)]
    return _Candidates(
        numbers=numbers,
        image=image[first],
        color=labels[image[first], row[first], column[first]],
        boxes=np.stack(low + high, 1).astype(np.float32),
        corners=np.rint(np.stack(middles, 1)).astype(np.intp) - WINDOW // 2,
    )


def _coverage(offsets: Floats, candidates: _Candidates) -> Floats:
    """Measure how much of each pixel around a candidate it covers, along its own colour, [N, WINDOW, WINDOW]."""
    rows = candidates.corners[:, 0, None, None] + np.arange(WINDOW)[:, None]
    columns = candidates.corners[:, 1, None, None] + np.arange(WINDOW)
    exists = (rows >= 0) & (rows < SIDE) & (columns >= 0) & (columns < SIDE)
    at = candidates.image[:, None, None], rows.clip(0, SIDE - 1), columns.clip(0, SIDE - 1)
    own = exists & (candidates.numbers[at] == np.arange(len(rows))[:, None, None])
    near = exists & (candidates.numbers[at] < 0) & ndimage.binary_dilation(own, AROUND)
    inner = ndimage.binary_erosion(own, AROUND)
    inner |= own & ~inner.any((1, 2), keepdims=True)  # too thin to have an inside
    weights = inner / inner.sum((1, 2), dtype=np.float32, keepdims=True)
    colors = np.einsum("nhwc,nhw->nc", offsets[at], weights)
    cover = np.einsum("nhwc,nc->nhw", offsets[at], colors / (colors**2).sum(1, keepdims=True))
    return np.where(own | near, cover.clip(0, 1), 0).astype(np.float32)


def _deviations(cover: Floats) -> Floats:
    """Measure how far coverages [N, WINDOW, WINDOW] are from each class where it fits best, [N, classes].

    That is the wrong coverage beyond a blemish, averaged over 3x3 pixels (blur and noise cancel, a missing corner does
    not), squared, and relative to the radius, because a longer contour collects more.
    """
    templates = _templates()
    rows = cover.reshape(-1, WINDOW**2)
    dots = rows @ templates.reshape(-1, WINDOW**2).T
    union = (rows**2).sum(1, keepdims=True) + (templates**2).sum(-1).ravel() - dots
    best = (dots / union).reshape(-1, *templates.shape[:2]).argmax(-1)  # by soft intersection over union
    wrong = (rows[:, None] - templates[np.arange(len(INSIDE)), best]).reshape(*best.shape, WINDOW, WINDOW)
    local = abs(ndimage.uniform_filter(wrong, (1, 1, 3, 3), mode="constant"))
    radii = np.repeat(RADII, len(SHIFTS) ** 2)[best]
    return np.asarray((np.maximum(local - np.float32(BLEMISH), 0) ** 2).sum((2, 3)) * (8 / radii), np.float32)
