"""Training curves: losses, GenEval in validation and the learning rate over steps, from metrics.csv."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Points = Mapping[str, Sequence[tuple[int, float]]]

_PANELS = {  # titles, and the columns that each shows
    "training loss": re.compile(r"train/(.*loss|l1|mse)"),
    "validation loss": re.compile(r"val/(.*loss|l1|mse)"),
    "GenEval on validation prompts": re.compile(r"val/geneval(/[^/]+)?"),
    "learning rate": re.compile("train/learning_rate"),
}
_SMOOTHED = 40  # points from which on the mean of a window is drawn over them


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what a run logged, by name, as steps and values.

    A run that was resumed has several files; where two have the same step, the later one counts.

    Args:
        folder: of the run, with metrics/metrics.csv and, of earlier parts, metrics-1/metrics.csv and so on.
    """
    earlier = sorted(folder.glob("metrics-*"), key=lambda path: int(path.name.removeprefix("metrics-")))
    points: dict[str, dict[int, float]] = {}
    for path in [*earlier, folder / "metrics"]:
        if not (path / "metrics.csv").is_file():
            continue
        with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        points.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in points.items()}


def curves_figure(points: Points, title: str) -> Figure | None:
    """Draw a panel each for the losses, GenEval and the learning rate, of those that were logged; None if none was."""
    panels = {name: [key for key in points if columns.fullmatch(key)] for name, columns in _PANELS.items()}
    panels = {name: keys for name, keys in panels.items() if keys}
    if not panels:
        return None
    figure = Figure(figsize=(9, 0.7 + 2.3 * len(panels)), layout="constrained")
    figure.suptitle(f"{title}: training", x=0.01, ha="left", fontsize=14, fontweight="bold")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, keys) in zip(all_axes, panels.items(), strict=True):
        for key in keys:
            steps, values = zip(*points[key], strict=True)
            label = re.sub("^(train|val)/(geneval/)?", "", key)
            if key == "val/geneval":
                axes.plot(steps, values, color="black", linestyle=":", zorder=3, label=f"{key}, which is monitored")
            elif len(values) < _SMOOTHED or name == "learning rate":
                axes.plot(steps, values, marker="o", markersize=3 if len(values) < _SMOOTHED else 0, label=label)
            else:
                (line,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3)
                axes.plot(steps, _smooth(values), color=line.get_color(), linewidth=1.5, label=f"{label}, smoothed")
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    all_axes[-1].set_xlabel("optimizer steps")
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window of a twentieth of all values to either side."""
    reach = max(1, len(values) // 20)
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
