"""Labels and points that cover nothing."""

import itertools

import numpy as np
import pytest

from lightning_modules.report.labels import Box, place_labels, spread_out

FRAME = Box(0, 0, 600, 400)


def around(x: float, y: float) -> Box:
    return Box(x - 3, y - 3, x + 3, y + 3)


@pytest.mark.parametrize("seed", range(5))
def test_twenty_labels_cover_neither_points_nor_one_another(seed: int) -> None:
    """Half of the points are crowded into a corner of the plot."""
    rng = np.random.default_rng(seed)
    places = [*rng.uniform((100, 100), (500, 300), (10, 2)), *rng.uniform((400, 250), (500, 330), (10, 2))]
    points = [around(x, y) for x, y in places]
    labels = place_labels(points, [(90, 10)] * 20, FRAME)
    for one, other in itertools.combinations([*points[:0], *labels], 2):
        assert one.overlap(other) == 0
    assert all(label.overlap(point) == 0 for label in labels for point in points)
    assert all(label.overlap(FRAME) == pytest.approx(label.area) for label in labels)


def test_a_label_is_beside_its_point_unless_that_is_taken() -> None:
    (label,) = place_labels([around(100, 100)], [(50, 10)], FRAME, gap=2)
    assert (label.x0, label.y0) == (105, 95)
    (label,) = place_labels([around(100, 100)], [(50, 10)], FRAME, [Box(104, 0, 600, 400)], gap=2)
    assert label.x1 == 95
    (label,) = place_labels([around(597, 100)], [(50, 10)], FRAME)
    assert label.x1 < 594  # to the right the frame ends


def test_where_nothing_is_free_least_is_covered() -> None:
    box = Box(0, 0, 64, 60)  # a shape as large as the image
    (label,) = place_labels([box], [(4, 4)], Box(0, 0, 64, 64))
    assert label == place_labels([box], [(4, 4)], Box(0, 0, 64, 64))[0]
    assert label.overlap(box) == 0 and label.y0 >= 60


def test_equal_positions_end_side_by_side_and_others_stay() -> None:
    assert spread_out([5, 5, 5, 50], 2) == [3, 5, 7, 50]
    assert spread_out([50, 5], 2) == [50, 5]
    moved = spread_out([10, 11, 12, 12, 40], 6)
    assert all(b - a >= 6 - 1e-9 for a, b in itertools.pairwise(moved)) and moved[-1] == 40
    assert np.mean(moved[:4]) == pytest.approx(11.25)
