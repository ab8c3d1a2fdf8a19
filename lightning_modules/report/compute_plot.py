"""GenEval against compute: a labelled point a strategy, and the front of those that nothing cheaper beats."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import BboxBase

from lightning_modules.report.labels import Box, place_labels, spread_out
from lightning_modules.report.results import EvaluationResult, RunInfo, StrategyResult

# The page puts its own in the places of these.
INK, SOFT, LINE, MARK, PAPER = "#1c1e21", "#5c6370", "#d3d7de", "#1f5fd0", "#ffffff"
_NEIGHBOURS = 6.0  # points between markers that stand side by side
_MARKER = 3.0  # points, the radius
_LEADER = 9.0  # points from which on a line leads from a label to its marker


def pareto_front(results: Iterable[StrategyResult]) -> list[StrategyResult]:
    """Return the results that no other one beats or equals for the same passes or fewer, cheapest first."""
    front: list[StrategyResult] = []
    for result in sorted(results, key=lambda result: (result.decoder_passes, -result.overall)):
        if not front or result.overall > front[-1].overall:
            front.append(result)
    return front


def compute_figure(evaluation: EvaluationResult, run: RunInfo) -> Figure:
    """The plot as a figure."""
    results = list(evaluation.strategies.values())
    figure = Figure(figsize=(10, 6.2), layout="constrained", dpi=150)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = pareto_front(result for result in results if result.name not in evaluation.ceilings)
    _frame(axes, results)
    _titles(axes, evaluation, run)
    canvas.draw()
    figure.set_layout_engine("none")
    x = _side_by_side(axes, [result.decoder_passes for result in results])
    at = {result.name: (place, result.overall) for result, place in zip(results, x, strict=True)}
    steps = _draw_front(axes, [at[result.name] for result in front]) if len(results) > 1 else []
    names = {result.name for result in front}
    for result in results:
        _draw_point(axes, result, at[result.name][0], result.name in names, result.name in evaluation.ceilings)
    labels = [_label(axes, result, at[result.name], result.name in names) for result in results]
    if len(results) > 1:
        _legend(axes, results, evaluation.ceilings)
    _place(figure, axes, [at[result.name] for result in results], labels, steps)
    return figure


def compute_svg(figure: Figure) -> str:
    """The figure as an <svg> element for the page, whose colours follow the page's light and dark."""
    file = io.StringIO()
    for label in figure.findobj(Annotation):
        label.set_path_effects([])  # which make outlines of letters
    with rc_context({"svg.hashsalt": "compute", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, name in ((INK, "ink"), (SOFT, "soft"), (LINE, "line"), (MARK, "mark"), (PAPER, "paper")):
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r"<metadata>.*</metadata>", "", svg, flags=re.S)  # it names addresses on the web
    return re.sub(r"^<svg[^>]*", '<svg viewBox="0 0 720 446.4"', svg)


def _frame(axes: Axes, results: Sequence[StrategyResult]) -> None:
    """Set limits and ticks: powers of two along the passes, tenths or twentieths along the scores."""
    passes = [result.decoder_passes for result in results]
    low, high = math.log2(min(passes)), math.log2(max(passes))
    room = max(0.12 * (high - low), 0.75 if high > low else 1.25)
    every = max(1, math.ceil((high - low + 2 * room) / 10))  # octaves between ticks
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - room), 2 ** (high + room))
    axes.set_xticks([2.0**k for k in range(math.floor(low - room), math.ceil(high + room) + 1) if k % every == 0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.set_xlim(2 ** (low - room), 2 ** (high + room))
    bottom = min(result.interval()[0] for result in results)
    top = max(result.interval()[1] for result in results)
    axes.set_ylim(max(bottom - 0.04, -0.02), min(top + 0.06, 1.04))
    axes.set_yticks(np.arange(0, 1.01, 0.1 if top - bottom > 0.4 else 0.05))
    axes.set_ylim(max(bottom - 0.04, -0.02), min(top + 0.06, 1.04))


def _titles(axes: Axes, evaluation: EvaluationResult, run: RunInfo) -> None:
    axes.set_title("GenEval against compute", loc="left", fontsize=14, fontweight="bold", color=INK, pad=24)
    about = ", ".join(part for part in (run.name, run.weights) if part)
    axes.annotate(
        f"{about}: {evaluation.amount}; bars are 95 % intervals over prompts", (0, 1), xytext=(0, 8),
        xycoords="axes fraction", textcoords="offset points", fontsize=9, color=SOFT,
    )  # fmt: skip
    axes.set_xlabel("decoder passes per image (log scale; points of equal cost stand side by side)", color=INK)
    axes.set_ylabel("GenEval score", color=INK)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0)


def _side_by_side(axes: Axes, passes: Sequence[float]) -> list[float]:
    """Move points along the axis so far that none covers another; returns their new places in passes."""
    scale = 72 / axes.figure.dpi
    points = [float(axes.transData.transform((each, 0))[0]) * scale for each in passes]
    moved = spread_out(points, _NEIGHBOURS)
    return [float(axes.transData.inverted().transform((place / scale, 0))[0]) for place in moved]


def _draw_front(axes: Axes, front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Draw a step at each strategy of the front; returns the corners of the line."""
    corners: list[tuple[float, float]] = []
    for x, score in front:
        corners += [(x, corners[-1][1]), (x, score)] if corners else [(x, score)]
    corners += [(axes.get_xlim()[1], corners[-1][1])] if corners else []
    axes.plot([x for x, _ in corners], [y for _, y in corners], color=MARK, linewidth=1.5, alpha=0.6, zorder=2)
    return corners


def _draw_point(axes: Axes, result: StrategyResult, x: float, is_best: bool, is_ceiling: bool) -> None:
    color = MARK if is_best else SOFT
    low, high = result.interval()
    axes.plot([x, x], [low, high], color=color, linewidth=1, alpha=0.35, zorder=1.5, solid_capstyle="butt")
    axes.plot(
        x, result.overall, marker="^" if is_ceiling else "o", markersize=2 * _MARKER, color=color, zorder=3,
        markerfacecolor=PAPER if is_ceiling or result.is_untrained else color, markeredgewidth=1.2,
    )  # fmt: skip


def _label(axes: Axes, result: StrategyResult, at: tuple[float, float], is_best: bool) -> Annotation:
    """Write a strategy's name at its point; `_place` moves it to where there is room."""
    return axes.annotate(
        result.title, at, xytext=(0, 0), textcoords="offset points", fontsize=8, ha="left", va="bottom", zorder=4,
        color=MARK if is_best else INK, fontweight="bold" if is_best else "normal", annotation_clip=False,
        path_effects=[withStroke(linewidth=2, foreground=PAPER)],
    )  # fmt: skip


def _legend(axes: Axes, results: Sequence[StrategyResult], ceilings: Sequence[str]) -> None:
    """Say what marks mean, of those that there are."""
    axes.plot([], [], color=MARK, marker="o", markersize=2 * _MARKER, label="Pareto front: nothing as cheap is better")
    if any(result.is_untrained for result in results):
        axes.plot([], [], "o", color=SOFT, markerfacecolor=PAPER, label="verifier before training")
    if ceilings:
        axes.plot([], [], "^", color=SOFT, markerfacecolor=PAPER, label="ceiling: chooses by the metric itself")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9, edgecolor=LINE, labelcolor=SOFT, facecolor=PAPER)


def _place(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[Annotation],
    steps: Sequence[tuple[float, float]],
) -> None:
    """Move labels to where they cover no marker, no other label, not the front and not the legend."""
    figure.canvas.draw()
    scale = 72 / figure.dpi

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(point) * scale
        return float(x), float(y)

    anchors = [Box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in map(place, points)]
    corners = [place(corner) for corner in steps]
    lines = [
        Box(min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1)
        for (x0, y0), (x1, y1) in pairwise(corners)
    ]
    legend = axes.get_legend()
    keep_clear = [*lines, *([_box(legend.get_window_extent(), scale)] if legend else [])]
    sizes = [(label.get_window_extent().width * scale, label.get_window_extent().height * scale) for label in labels]
    boxes = place_labels(anchors, sizes, _box(axes.bbox, scale), keep_clear)
    for label, box, (x, y) in zip(labels, boxes, map(place, points), strict=True):
        # Aligned to its marker: the page writes it in whatever font a browser has.
        side, edge = (
            ("right", box.x1) if box.x1 <= x else ("left", box.x0) if box.x0 >= x else ("center", (box.x0 + box.x1) / 2)
        )
        label.set(position=(edge - x, box.y0 - y), horizontalalignment=side)
        nearest = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        if math.dist(nearest, (x, y)) > _LEADER:
            ends = axes.transData.inverted().transform(np.array([(x, y), nearest]) / scale)
            axes.plot(*ends.T, color=SOFT, linewidth=0.6, zorder=2.5)


def _box(bbox: BboxBase, scale: float) -> Box:
    """A box of pixels in points."""
    return Box(*(float(value) * scale for value in bbox.extents))
