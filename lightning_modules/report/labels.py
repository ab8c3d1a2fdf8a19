"""Where labels go, so that they cover neither what is drawn nor one another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RINGS = 14  # distances at which a label is tried
_TOWARDS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # tried in this order
_OUTSIDE = 1e3  # how much worse it is to leave the frame than to cover something


@dataclass(frozen=True)
class Box:
    """A rectangle, with x0 <= x1 and y0 <= y1, in any unit."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: "Box") -> float:
        """Return the area that both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)


def place_labels(
    anchors: Sequence[Box],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    obstacles: Sequence[Box] = (),
    gap: float = 2.0,
    near: float = 0.0,
) -> list[Box]:
    """Place a label beside each anchor, one after the other, each at the nearest free place.

    Where nothing is free, a label takes the place that covers least.

    Args:
        anchors: what the labels belong to; no label covers any of them.
        sizes: width and height of each label.
        frame: where labels may be.
        obstacles: what else they may not cover.
        gap: distance from the anchor, and the step by which it grows.
        near: how bad it is that a label is beside another anchor as well, of how bad it is to cover that.

    Returns:
        The boxes of the labels, in the order of the anchors.
    """
    taken = [*anchors, *obstacles]
    placed: dict[int, Box] = {}
    crowded = [
        sum(abs(a.x0 - b.x0) + abs(a.y0 - b.y0) < 8 * max(sizes[i]) for b in anchors) for i, a in enumerate(anchors)
    ]
    for i in sorted(range(len(anchors)), key=lambda i: (-crowded[i], i)):
        candidates = _candidates(anchors[i], sizes[i], gap)
        others = [anchor for j, anchor in enumerate(anchors) if j != i]
        costs = [_cost(box, taken, frame) + near * _nearness(box, others, gap) for box in candidates]
        placed[i] = candidates[int(np.argmin(costs))]  # of equal ones the first, which is the nearest
        taken.append(placed[i])
    return [placed[i] for i in range(len(anchors))]


def spread_out(positions: Sequence[float], distance: float) -> list[float]:
    """Move positions as little as possible so that neighbours are `distance` apart; their order stays.

    Equal ones end side by side, in the order in which they are given. These are the least squares, by pooling adjacent
    violators.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    pools: list[list[float]] = []
    for place, i in enumerate(order):
        pools.append([positions[i] - place * distance])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    flat = [float(np.mean(pool)) for pool in pools for _ in pool]
    moved = {i: flat[place] + place * distance for place, i in enumerate(order)}
    return [moved[i] for i in range(len(positions))]


def _candidates(anchor: Box, size: tuple[float, float], gap: float) -> list[Box]:
    """Boxes of a size around an anchor, the nearest first."""
    width, height = size
    x, y = (anchor.x0 + anchor.x1) / 2, (anchor.y0 + anchor.y1) / 2
    boxes = []
    for ring in range(_RINGS):
        away = gap * (1 + ring * (1 + ring / 4))
        for right, up in _TOWARDS:
            left = anchor.x1 + away if right > 0 else anchor.x0 - away - width if right < 0 else x - width / 2
            low = anchor.y1 + away if up > 0 else anchor.y0 - away - height if up < 0 else y - height / 2
            boxes.append(Box(left, low, left + width, low + height))
    return boxes


def _nearness(box: Box, others: Sequence[Box], gap: float) -> float:
    """Say how much of what surrounds a label belongs to other anchors, for which it might be taken."""
    around = Box(box.x0 - 2 * gap, box.y0 - 2 * gap, box.x1 + 2 * gap, box.y1 + 2 * gap)
    return sum(around.overlap(other) for other in others)


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    outside = box.area - box.overlap(frame)
    return sum(box.overlap(other) for other in taken) + _OUTSIDE * max(outside, 0.0)
