"""The drawing that is bundled as COCO's self-test: a stop sign at the roadside."""

from itertools import pairwise

import numpy as np

SIDE, SAMPLES = 512, 2  # pixels; samples per pixel and direction
# Letters of a cell 34 wide and 76 high as polylines, rounded parts as arcs (centre, radii, degrees from and to).
LETTERS = {
    "S": [((17, 19.5), (15, 19.5), -30, -270), ((17, 56.5), (15, 19.5), -90, 150)],
    "T": [[(0, 0), (34, 0)], [(17, 0), (17, 76)]],
    "O": [((17, 38), (16, 38), 0, 360)],
    "P": [[(2, 0), (2, 76)], [(2, 0), (14, 0)], ((14, 20), (19, 20), -90, 90), [(14, 40), (2, 40)]],
}


def _points(stroke: list | tuple) -> np.ndarray:
    """A stroke as a polyline [n, 2] of (x, y)."""
    if isinstance(stroke, list):
        return np.array(stroke, float)
    center, radii, start, end = stroke
    angles = np.radians(np.linspace(start, end, 24))
    return np.array(center) + np.stack([np.cos(angles), np.sin(angles)], 1) * radii


def _near(points: np.ndarray, x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
    """Which places are no further than `reach` from a polyline."""
    near = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in pairwise(points):
        along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / ((x2 - x1) ** 2 + (y2 - y1) ** 2)
        along = along.clip(0, 1)
        near |= np.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)) <= reach
    return near


def stop_sign() -> np.ndarray:
    """The picture, uint8 [512, 512, 3]: sky, grass, a grey post, and on it a red octagon with white rim and letters."""
    grid = (np.arange(SIDE * SAMPLES) + 0.5) / SAMPLES
    x, y = np.meshgrid(grid, grid)
    height = (y / SIDE)[..., None]
    sky = np.array([110, 165, 220]) * (1 - height) + np.array([225, 235, 240]) * height
    grass = np.array([120, 150, 80]) * (1.6 - height) + np.array([40, 60, 20]) * (height - 0.6)
    picture = np.where((y > 372 + 6 * np.sin(x / 60))[..., None], grass, sky)

    def paint(where: np.ndarray, color: tuple[int, int, int]) -> None:
        picture[where] = np.array(color) * (1.06 - 0.16 * height[where])  # lit from above

    paint((abs(x - 256) < 7) & (y > 200), (150, 150, 155))
    left, down = abs(x - 256), abs(y - 196)
    apothem = np.maximum(np.maximum(left, down), (left + down) / np.sqrt(2))
    paint(apothem < 124, (245, 245, 245))
    paint(apothem < 115, (190, 25, 35))
    letters, middle = np.zeros(x.shape, bool), np.s_[290:500, 300:720]
    for number, strokes in enumerate(LETTERS.values()):
        for stroke in strokes:
            letters[middle] |= _near(_points(stroke), x[middle] - 163 - 50.5 * number, y[middle] - 158, 6.5)
    paint(letters, (245, 245, 245))
    averaged = picture.reshape(SIDE, SAMPLES, SIDE, SAMPLES, 3).mean((1, 3))
    return np.rint(averaged).astype(np.uint8)
