"""GenEval against compute, drawn."""

import itertools
import re

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from lightning_modules.report.compute_plot import compute_figure, compute_svg, pareto_front
from lightning_modules.report.results import StrategyResult
from tests.helpers.results import RUN, make_evaluation, make_result


def strategies(count: int) -> dict[str, StrategyResult]:
    """Strategies of long names at few costs, so that many coincide."""
    names = [f"strategy_with_a_long_name_{i}" for i in range(count)]
    return {
        name: make_result([True] * (20 + i) + [False] * (20 - i % 20), name=name, passes=128.0 * 2 ** (i % 4))
        for i, name in enumerate(names)
    }


def boxes(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Pixels of the labels, by their texts."""
    figure.canvas.draw()
    labels = [label for label in figure.findobj(Annotation) if label.get_text().startswith("strategy")]
    return {label.get_text(): tuple(label.get_window_extent().extents) for label in labels}


@pytest.mark.parametrize("count", [1, 2, 20])
def test_no_label_covers_another(count: int) -> None:
    figure = compute_figure(make_evaluation(strategies(count)), RUN)
    found = boxes(figure)
    assert len(found) == count
    (axes,) = figure.axes
    for (x0, y0, x1, y1), (u0, v0, u1, v1) in itertools.combinations(found.values(), 2):
        assert min(x1, u1) - max(x0, u0) < 0.5 or min(y1, v1) - max(y0, v0) < 0.5
    left, bottom, right, top = axes.bbox.extents
    assert all(left <= x0 and bottom <= y0 and x1 <= right and y1 <= top for x0, y0, x1, y1 in found.values())


def test_equal_costs_stand_side_by_side_and_ticks_are_round() -> None:
    results = {name: make_result([True, False] * 10, name=name, passes=128.0) for name in ("a", "b", "c")}
    (axes,) = compute_figure(make_evaluation(results), RUN).axes
    markers = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    at = sorted(axes.transData.transform((line.get_xdata()[0], 0.5))[0] for line in markers)
    assert len(at) == 3 and all(b - a > 8 for a, b in itertools.pairwise(at))
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [64, 128, 256]
    assert "per image" in axes.get_xlabel() and axes.get_title(loc="left")


def test_the_front_has_what_nothing_as_cheap_beats() -> None:
    cheap, same, worse, best = (
        make_result([True] * right + [False] * (20 - right), name=name, passes=passes)
        for name, right, passes in (("cheap", 12, 1), ("same", 12, 2), ("worse", 4, 4), ("best", 20, 8))
    )
    assert [result.name for result in pareto_front([best, worse, same, cheap])] == ["cheap", "best"]


def test_a_ceiling_is_not_on_the_front_and_is_marked() -> None:
    results = {
        "plain": make_result([True, False] * 10, name="plain", passes=1),
        "oracle": make_result([True] * 20, name="oracle", passes=8),
    }
    (axes,) = compute_figure(make_evaluation(results, ["oracle"]), RUN).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1].startswith("ceiling")
    assert sum(line.get_marker() == "^" and len(line.get_xdata()) for line in axes.lines) == 1


def test_the_page_gets_it_without_addresses_and_the_same_every_time() -> None:
    one, other = (compute_svg(compute_figure(make_evaluation(strategies(20)), RUN)) for _ in range(2))
    assert one == other and one.startswith("<svg") and len(one) < 100_000
    assert "http" not in one and not re.search(r"#[0-9a-f]{6}", one)
    assert "strategy_with_a_long_name_19</text>" in one
