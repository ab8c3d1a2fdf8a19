"""Sheets of images with their prompts and verdicts: one strategy's, or all strategies side by side."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightning_modules.report.results import SIDE_BY_SIDE, EvaluationResult, RunInfo, StrategyResult
from lightning_modules.report.verdicts import plain_verdict

_INK, _SOFT, _RIGHT, _WRONG = "#1c1e21", "#5c6370", "#17703a", "#b3261e"
_MARGIN, _GAP, _FRAME = 20, 16, 3  # pixels: around everything, between cells, of the frame around an image
_SIDE = 120  # pixels that an image takes at least, along its longer side; small ones are enlarged by whole numbers
_LARGEST = 256  # pixels that it takes at most
_COLUMNS = range(4, 9)  # of a contact sheet
_ROWS = 12  # of the sheet side by side


class _Sheet:
    """A white picture that grows downwards.

    Args:
        width: in pixels.
    """

    def __init__(self, width: int) -> None:
        self.image = Image.new("RGB", (width, _MARGIN), "white")
        self.draw = ImageDraw.Draw(self.image)

    def grow(self, height: int) -> int:
        """Add pixels below; returns where they begin."""
        top = self.image.height
        taller = Image.new("RGB", (self.image.width, top + height), "white")
        taller.paste(self.image)
        self.image, self.draw = taller, ImageDraw.Draw(taller)
        return top

    def write(self, text: str, x: int, y: int, width: int, size: int, color: str, bold: bool = False) -> int:
        """Write text that is broken to fit; returns where it ends."""
        for line in wrapped(text, width, size, bold):
            self.draw.text((x, y), line, fill=color, font=_font(size, bold))
            y += _line(size)
        return y

    def heading(self, title: str, lines: Sequence[str]) -> None:
        """Add a title, and lines of small print below it."""
        width = self.image.width - 2 * _MARGIN
        height = _height(title, width, 18, bold=True) + sum(_height(line, width, 12) for line in lines) + 12
        y = self.write(title, _MARGIN, self.grow(height), width, 18, _INK, bold=True)
        for line in lines:
            y = self.write(line, _MARGIN, y, width, 12, _SOFT)

    def picture(self, pixels: np.ndarray, x: int, y: int, side: int, color: str) -> None:
        """Put an image, uint8 [H, W, 3], into a square with a frame."""
        image = Image.fromarray(pixels)
        image = image.resize(_fitting(image.size, side), _filter(image.size, side))
        left, top = x + _FRAME + (side - image.width) // 2, y + _FRAME + (side - image.height) // 2
        self.draw.rectangle((x, y, x + side + 2 * _FRAME - 1, y + side + 2 * _FRAME - 1), outline=color, width=_FRAME)
        self.image.paste(image, (left, top))


def contact_sheet(result: StrategyResult, about: str) -> Image.Image:
    """Draw the images of a strategy with their prompts and verdicts, in rows that are full where that is possible.

    Args:
        result: with thumbnails.
        about: whose images they are, in small print.
    """
    side = _side(result)
    width = side + 2 * _FRAME
    indices = list(result.thumbnails)
    columns = _columns(len(indices))
    sheet = _Sheet(2 * _MARGIN + max(columns, 3) * width + (max(columns, 3) - 1) * _GAP)
    low, high = result.interval()
    right = sum(result.row_of(index)["correct"] for index in indices)
    shown = f"Shown: the first image of {len(indices)} prompts, {right} of them right."
    title = f"{result.title}: GenEval {result.overall:.3f} (95 %: {low:.2f} to {high:.2f})"
    sheet.heading(title, [about, shown] if about else [shown])
    for start in range(0, len(indices), columns):
        row = indices[start : start + columns]
        texts = [(_prompt(result, index), _verdict(result, index)) for index in row]
        height = max(_height(prompt, width, 11) + _height(verdict, width, 11) for prompt, verdict in texts)
        top = sheet.grow(width + 4 + height + _GAP)
        for column, (index, (prompt, verdict)) in enumerate(zip(row, texts, strict=True)):
            x, color = _MARGIN + column * (width + _GAP), _color(result, index)
            sheet.picture(result.thumbnails[index], x, top, side, color)
            y = sheet.write(prompt, x, top + width + 4, width, 11, _INK)
            sheet.write(verdict, x, y, width, 11, color)
    return sheet.image


def side_by_side(evaluation: EvaluationResult, run: RunInfo) -> Image.Image:
    """Draw a prompt a row and a strategy a column, with the verdict on each image.

    The prompts are the first ones of each task, whatever became of them.
    """
    results = list(evaluation.strategies.values())
    indices = _first_of_each_task(results[0])
    side = _side(results[0])
    width, label = side + 2 * _FRAME, 150
    sheet = _Sheet(2 * _MARGIN + label + len(results) * (width + _GAP))
    sheet.heading(
        "The same prompts by each strategy", [_about(evaluation, run), _rule(evaluation, results[0], indices)]
    )
    heads = [(result.title, _score(result), f"{result.decoder_passes:,.0f} decoder passes") for result in results]
    names = max(_height(name, width, 12, bold=True) for name, *_ in heads)
    top = sheet.grow(names + 2 * _line(11) + 6)
    for column, (name, score, cost) in enumerate(heads):
        x = _MARGIN + label + _GAP + column * (width + _GAP)
        sheet.write(name, x, top, width, 12, _INK, bold=True)
        sheet.write(f"{score}\n{cost}", x, top + names, width, 11, _SOFT)
    for index in indices:
        verdicts = [_verdict(result, index) for result in results]
        height = max(_height(verdict, width, 11) for verdict in verdicts)
        top = sheet.grow(width + 4 + height + _GAP)
        y = sheet.write(_prompt(results[0], index), _MARGIN, top, label, 13, _INK, bold=True)
        sheet.write(results[0].row_of(index)["tag"].replace("_", " "), _MARGIN, y + 2, label, 11, _SOFT)
        for column, (result, verdict) in enumerate(zip(results, verdicts, strict=True)):
            x, color = _MARGIN + label + _GAP + column * (width + _GAP), _color(result, index)
            sheet.picture(result.thumbnails[index], x, top, side, color)
            sheet.write(verdict, x, top + width + 4, width, 11, color)
    return sheet.image


def sheets(evaluation: EvaluationResult, run: RunInfo) -> dict[str, Image.Image]:
    """Draw each strategy's own sheet, by its name, and `side_by_side`."""
    about = _about(evaluation, run)
    own = {name: contact_sheet(result, about) for name, result in evaluation.strategies.items() if result.thumbnails}
    return {**own, SIDE_BY_SIDE: side_by_side(evaluation, run)} if own else {}


def wrapped(text: str, width: int, size: int, bold: bool = False) -> list[str]:
    """Break text at spaces, and words that are too long at underscores or anywhere, so that each line fits."""
    font, lines = _font(size, bold), []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if len(longer) <= width and font.getlength(longer) <= width:  # a letter takes a pixel at least
                line = longer
                continue
            lines += [line] if line else []
            while len(word) > width or font.getlength(word) > width:
                reach = word[:width]
                lengths = [*accumulate(map(font.getlength, reach))]
                cut = max(1, bisect_right(lengths, width))
                cut = word.rfind("_", 1, cut) + 1 or cut
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    return lines


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings, which has a tick and a cross."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _line(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(1.35 * size)


def _height(text: str, width: int, size: int, bold: bool = False) -> int:
    return len(wrapped(text, width, size, bold)) * _line(size)


def _about(evaluation: EvaluationResult, run: RunInfo) -> str:
    return ", ".join(part for part in (run.name, run.weights, evaluation.amount) if part)


def _score(result: StrategyResult) -> str:
    """The score in words: of too few prompts to say anything of others, how many images are correct."""
    if result.interval() == (0.0, 1.0):
        return f"{sum(row['correct'] for row in result.rows)} of {len(result.rows)} correct"
    return f"GenEval {result.overall:.3f}"


def _rule(evaluation: EvaluationResult, result: StrategyResult, indices: Sequence[int]) -> str:
    """Say how the prompts were chosen."""
    each = max(Counter(result.row_of(index)["tag"] for index in indices).values())
    which = "first prompt" if each == 1 else f"first {each} prompts"
    kept = "" if len(result.thumbnails) == evaluation.settings["prompts"] else " of those with pictures"
    return f"Prompts by rule, not by result: the {which} of each task{kept}, the first image of each."


def _first_of_each_task(result: StrategyResult) -> list[int]:
    """Pick as many prompts of each task as rows allow, in their order."""
    each = max(1, _ROWS // len(result.tasks))
    tags = {index: result.row_of(index)["tag"] for index in result.thumbnails}
    return [
        index for index, tag in tags.items() if [i for i, other in tags.items() if other == tag].index(index) < each
    ]


def _prompt(result: StrategyResult, index: int) -> str:
    return str(result.row_of(index)["prompt"]).removeprefix("a photo of ")


def _verdict(result: StrategyResult, index: int) -> str:
    row = result.row_of(index)
    return ("✓ " if row["correct"] else "✗ ") + plain_verdict(row)


def _color(result: StrategyResult, index: int) -> str:
    return _RIGHT if result.row_of(index)["correct"] else _WRONG


def _columns(images: int) -> int:
    """How many images a row has: as many as leave fewest places empty, or about six."""
    if images < _COLUMNS[0]:
        return max(images, 1)
    return min(_COLUMNS, key=lambda columns: (-images % columns, abs(columns - 6)))


def _side(result: StrategyResult) -> int:
    """Pixels along the square that images are put into."""
    longer = max(max(pixels.shape[:2]) for pixels in result.thumbnails.values())
    return min(longer * -(-_SIDE // longer), _LARGEST)


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    longer = max(size)
    return round(size[0] * side / longer), round(size[1] * side / longer)


def _filter(size: tuple[int, int], side: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if max(size) < side else Image.Resampling.LANCZOS
