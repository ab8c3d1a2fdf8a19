"""What an evaluation leaves: geneval.json, results.jsonl, contact sheets, a plot, and the table on the console."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.files import whole, write_text
from lightning_modules.report.drawing import TraceView
from lightning_modules.rewards.geneval import TASKS, Verdict

BEFORE_TRAINING = "_before_training"  # ends the names of rows whose verifier is the untrained one
_HEADINGS = ("single", "two", "count", "colors", "position", "attr.")  # of TASKS, in its order


def result_row(filename: str, metadata: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """An image's row of results.jsonl, in the official columns."""
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(verdict.details),
    }


def result_line(row: Mapping[str, Any]) -> str:
    """A row as the official evaluation writes it, byte for byte: compact, with its slashes escaped."""
    return json.dumps(row, separators=(",", ":")).replace("/", r"\/")


@dataclass(frozen=True)
class StrategyResult:
    """One strategy's images and scores.

    Attributes:
        name: of the strategy.
        overall: mean of the task means.
        tasks: share of correct images of each task.
        rows: one an image, with the columns of GenEval's results.jsonl.
        thumbnails: uint8 [H, W, 3] of some prompts' first images, by prompt index.
        decoder_forwards: forward passes of the decoder an image, with and without the prompt counted apart.
        verifier_calls: values asked of a judge, an image.
        seconds: wall time an image, summed over ranks.
        objects: found in an image.
        independent: mean opinion of judges, by name.
        tokens: image tokens that went through the decoder, an image.
        stats: means of what a strategy measures of its images, by name.
        stories: how the images of `thumbnails` were made.
    """

    name: str
    overall: float
    tasks: dict[str, float]
    rows: list[dict[str, Any]]
    thumbnails: dict[int, np.ndarray]
    decoder_forwards: float
    verifier_calls: float
    seconds: float
    objects: float
    independent: dict[str, float]
    tokens: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)
    stories: dict[int, TraceView] = field(default_factory=dict)

    def row_of(self, index: int) -> dict[str, Any]:
        """The row of the first image of prompt `index`."""
        return next(row for row in self.rows if int(row["filename"].split("/")[0]) == index)

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `overall` over prompts; 0 to 1 where a task has only one, which says nothing."""
        prompts = {(row["tag"], row["prompt"]) for row in self.rows}
        if min(Counter(tag for tag, _ in prompts).values()) == 1:
            return 0.0, 1.0
        low, high = np.quantile(_resampled([self]), [0.025, 0.975])
        return float(low), float(high)

    def gain_over(self, base: "StrategyResult") -> tuple[float, float, float]:
        """`overall` above that of another result on the same prompts, with its 95 % bootstrap interval."""
        own, other = _resampled([self, base])
        low, high = np.quantile(own - other, [0.025, 0.975])
        return self.overall - base.overall, float(low), float(high)


def _resampled(results: Sequence[StrategyResult], resamples: int = 2000) -> np.ndarray:
    """Bootstrap samples of `overall` of results on the same prompts, [len(results), resamples].

    Distinct prompts are resampled within their task, with all their images: images of one prompt are not independent,
    and neither are rows that repeat a prompt. All results are given the same prompts, so that differences are paired.
    """
    rng = np.random.default_rng(0)
    means = []
    for task in results[0].tasks:
        counts: dict[str, np.ndarray] = {}  # of a prompt: correct images and images, of each result
        for i, result in enumerate(results):
            for row in result.rows:
                if row["tag"] == task:
                    entry = counts.setdefault(row["prompt"], np.zeros((len(results), 2), np.int64))
                    entry[i] += (row["correct"], 1)
        table = np.stack(list(counts.values()))
        drawn = table[rng.integers(0, len(table), (resamples, len(table)))].sum(1)
        means.append(drawn[..., 0] / drawn[..., 1])
    return np.mean(means, axis=0).T


def write_report(folder: Path, about: Mapping[str, Any], results: Mapping[str, StrategyResult]) -> None:
    """Write geneval.json, results.jsonl, compute.png and sheets/NAME.png into the run's folder."""
    strategies = {}
    lines = []
    for name, result in results.items():
        low, high = result.interval()
        strategies[name] = {
            "overall": result.overall,
            "interval_95": [low, high],
            "tasks": result.tasks,
            "decoder_forwards_per_image": result.decoder_forwards,
            "verifier_calls_per_image": result.verifier_calls,
            "tokens_per_image": result.tokens,
            "seconds_per_image": result.seconds,
            "objects_per_image": result.objects,
            "independent": result.independent,
            "stats": result.stats,
        }
        lines += [result_line(row | {"filename": f"{name}/{row['filename']}"}) for row in result.rows]
        save_image(contact_sheet(result), folder / "sheets" / f"{name}.png")
    for sheet in (folder / "sheets").glob("*.png"):
        if sheet.stem not in results:  # of an earlier test of this run, which other weights took
            sheet.unlink(missing_ok=True)
    plot_compute(results, folder / "compute.png")
    report = {"benchmark": "GenEval", **about, "strategies": strategies}
    write_text(folder / "geneval.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "results.jsonl", "\n".join(lines) + "\n")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with whole(path) as partial:
        image.save(partial, format="PNG")


def save_figure(figure: Figure, path: Path) -> None:
    """The same of a plot."""
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The same of a table, whose columns are the keys of its first row."""
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def spread(total: int, wanted: int) -> set[int]:
    """`wanted` indices (or all, if there are fewer): one from each of as many windows of 0..total.

    Each is one place further along in its window: a fixed step would meet the same one of prompts that repeat in turn.
    """
    return {i * total // wanted + i % max(1, total // wanted) for i in range(wanted)}


def plot_compute(results: Mapping[str, StrategyResult], path: Path) -> None:
    """GenEval, with its interval, against the decoder's forward passes an image, a point a strategy."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, result) in enumerate(results.items()):
        low, high = result.interval()
        error = [[max(result.overall - low, 0)], [max(high - result.overall, 0)]]
        marker = "os^Dv*P"[number // 10 % 7]  # ten colours are not enough
        axes.errorbar(result.decoder_forwards, result.overall, error, fmt=marker, capsize=2, label=name)
    axes.set(xscale="log", xlabel="forward passes of the decoder an image", ylabel="GenEval, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    save_figure(figure, path)


def contact_sheet(result: StrategyResult, columns: int = 6, scale: int = 2, largest: int = 256) -> Image.Image:
    """Images, `scale` times as large but `largest` pixels at most, with prompts, framed green, or red with reasons."""
    font = ImageFont.load_default(11)
    side = min(scale * next(iter(result.thumbnails.values())).shape[0], largest)
    width = side + 60
    captions = []
    for index in result.thumbnails:
        row = result.row_of(index)
        caption = row["prompt"].removeprefix("a photo of ") + "\n" + row["reason"]
        captions.append("\n".join(_wrap(line, width - 8, font) for line in caption.splitlines()))
    text = 13 * max(caption.count("\n") + 1 for caption in captions)
    height = side + text + 12
    lines = -(-len(result.thumbnails) // columns)
    sheet = Image.new("RGB", (columns * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (index, pixels) in enumerate(result.thumbnails.items()):
        x, y = (place % columns) * width, (place // columns) * height
        row = result.row_of(index)
        filter_ = Image.Resampling.NEAREST if len(pixels) < side else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(pixels).resize((side, side), filter_), (x + 30, y + 3))
        color = "green" if row["correct"] else "red"
        draw.rectangle((x + 28, y + 1, x + 31 + side, y + 4 + side), outline=color, width=2)
        draw.multiline_text((x + 4, y + side + 8), captions[place], fill="black", font=font, spacing=1)
    return sheet


def _wrap(line: str, width: int, font: Any) -> str:
    """Break a line at spaces so that it fits, pixels."""
    rows = [""]
    for word in line.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return "\n".join(rows)


def print_table(results: Mapping[str, StrategyResult]) -> None:
    """Print strategies x tasks, with intervals, costs (unless all are unknown) and what other judges say."""
    table = Table(title="GenEval", box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    costly = any(result.decoder_forwards for result in results.values())
    judges = list(dict.fromkeys(judge for result in results.values() for judge in result.independent))
    for heading in ("overall", "95 %", *_HEADINGS, *(("decoder", "verifier", "s/image") if costly else ()), *judges):
        table.add_column(heading, justify="right", no_wrap=True)
    untrained = False
    for name, result in results.items():
        if name.endswith(BEFORE_TRAINING) != untrained:
            untrained = not untrained
            table.add_section()
            table.add_row("before training" if untrained else "after training", style="italic")
        low, high = result.interval()
        tasks = [f"{result.tasks[task]:.2f}" if task in result.tasks else "-" for task in TASKS]
        costs = [f"{result.decoder_forwards:.0f}", f"{result.verifier_calls:.0f}", f"{result.seconds:.3f}"]
        opinions = [f"{result.independent[judge]:.3f}" if judge in result.independent else "-" for judge in judges]
        scores = f"{result.overall:.3f}", f"{low:.2f}-{high:.2f}", *tasks
        table.add_row(name.removesuffix(BEFORE_TRAINING), *scores, *(costs if costly else ()), *opinions)
    print_plain(table)


def print_plain(table: Table) -> None:
    """Print a table as wide as it is, with names as they are: `[bold]` and `:star:` are no markup."""
    Console(width=10_000, markup=False, emoji=False, highlight=False).print(table)
