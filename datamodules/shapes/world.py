"""The renderer: scenes of coloured shapes, centred on an 8-pixel grid, on a flat background, 64x64 pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 64
GRID = 8
RADII = (8, 12)
TRIES = 32  # placements drawn at a time, until one fits
GAP = 4  # pixels of background that always remain between two objects
PALETTE = {
    "red": (224, 32, 32), "orange": (255, 140, 0), "yellow": (250, 225, 30), "green": (30, 160, 50),
    "blue": (30, 70, 220), "purple": (130, 40, 170), "pink": (255, 130, 190), "brown": (115, 65, 25),
    "black": (15, 15, 15), "white": (255, 255, 255),
}  # fmt: skip
BACKGROUNDS = ((170, 170, 170), (180, 172, 164), (164, 172, 180), (172, 180, 168))


@dataclass(frozen=True)
class SceneObject:
    """An object: class and colour by name, centre and radius in pixels (y grows downwards)."""

    name: str
    color: str
    x: int
    y: int
    radius: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 in pixels."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Scene:
    """Objects that do not touch, on one of the backgrounds."""

    objects: tuple[SceneObject, ...]
    background: int


def _polygon(corners: Sequence[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the even-odd test of a polygon."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x, dtype=bool)
        for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
            crosses = (y1 > y) != (y2 > y)
            result ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1 + 1e-12) + x1)
        return result

    return inside


_TENTHS = np.arange(10) * np.pi / 5 - np.pi / 2
_STAR = [(r * np.cos(a), r * np.sin(a)) for a, r in zip(_TENTHS, [1.0, 0.42] * 5, strict=True)]
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.92,
    "triangle": _polygon([(0.0, -0.95), (1.0, 0.9), (-1.0, 0.9)]),
    "star": _polygon(_STAR),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.97),
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "heart": lambda x, y: (
        ((1.2 * x) ** 2 + (0.15 - 1.15 * y) ** 2 - 0.75) ** 3 < (1.2 * x) ** 2 * (0.15 - 1.15 * y) ** 3
    ),
}


@cache
def _sprite(name: str, radius: int) -> np.ndarray:
    """Return the coverage of each pixel around the centre, float32 [2r, 2r, 1], from 8x8 samples a pixel."""
    side = 2 * radius
    samples = (np.arange(side * 8) + 0.5) / (8 * radius) - 1
    y, x = np.meshgrid(samples, samples, indexing="ij")
    inside = _INSIDE[name](x, y).astype(np.float32)
    return inside.reshape(side, 8, side, 8).mean(axis=(1, 3))[..., None]


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 [64, 64, 3]."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        window = canvas[item.y - item.radius : item.y + item.radius, item.x - item.radius : item.x + item.radius]
        window += _sprite(item.name, item.radius) * (np.asarray(PALETTE[item.color], np.float32) - window)
    return np.rint(canvas).astype(np.uint8)


def place(
    rng: np.random.Generator, radii: Sequence[int], accept: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Draw centres on the grid, int [n, 2] as (x, y), for objects that neither touch nor leave the image.

    `accept` says which of several centres [TRIES, n, 2] fulfil a further wish (a relation), bool [TRIES].
    """
    reach = np.asarray(radii)
    low = np.ceil(reach / GRID).astype(int)
    high = SIZE // GRID - low
    first, second = np.triu_indices(len(radii), 1)
    needed = reach[first] + reach[second] + GAP
    while True:
        centres = rng.integers(low[:, None], high[:, None] + 1, (TRIES, len(radii), 2)) * GRID
        distance = np.abs(centres[:, first] - centres[:, second]).max(-1)
        fits = (distance >= needed).all(-1)
        if accept is not None:
            fits &= accept(centres)
        if fits.any():
            return centres[int(fits.argmax())]
