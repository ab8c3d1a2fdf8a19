"""Pictures of an evaluation: contact sheets, and GenEval against compute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lightning_modules.files import whole
from lightning_modules.report.results import StrategyResult


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with whole(path) as partial:
        image.save(partial, format="PNG")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a plot as a PNG file, whole or not at all."""
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def pick_prompt_indices(total: int, wanted: int) -> set[int]:
    """Pick `wanted` indices (or all, if there are fewer): one from each of as many windows of 0..total.

    Each is one place further along in its window: a fixed step would meet the same one of prompts that repeat in turn.
    """
    return {i * total // wanted + i % max(1, total // wanted) for i in range(wanted)}


def plot_compute(results: Mapping[str, StrategyResult], path: Path) -> None:
    """Draw GenEval, with its interval, against the decoder's forward passes an image: a point a strategy."""
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
    """Draw images, `scale` times as large but `largest` pixels at most, with prompts; wrong ones say why, in red."""
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
