"""The page of an evaluation: one HTML file, with every picture inside, that shows what was made, how, and why."""

import io
import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from lightning_modules.files import write_text
from lightning_modules.report.compute_plot import compute_svg
from lightning_modules.report.drawing import Curve, format_score, format_scores, png, shrunk
from lightning_modules.report.labels import Box, place_labels
from lightning_modules.report.pictures import pick_prompt_indices
from lightning_modules.report.results import COSTS, EvaluationResult, RunInfo, StrategyResult, format_cost
from lightning_modules.report.verdicts import plain_verdict
from lightning_modules.rewards.geneval_metadata import TASKS

_LARGEST = 256  # pixels along the longer side of an image
_MOST = 4_900_000  # bytes of the page: prompts are left out rather than that it grows larger
_FILES = ("geneval.json", "results.jsonl", "config.yaml", "compute.png", "sheets/side_by_side.png")


def write_page(path: Path, evaluation: EvaluationResult, run: RunInfo, compute: Figure) -> None:
    """Write the page of the prompts that have thumbnails. It needs no server, no network, and no script to be read.

    Whatever comes from prompts is escaped by the template.

    Args:
        path: of the page; it links to the files of the report that are beside it.
        evaluation: what it shows.
        run: for the header.
        compute: the plot against compute.
    """
    results = list(evaluation.strategies.values())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data": _data, "few_colors": _in_few_colors, "curve": _curve}
    environment.filters |= {"format_score": format_score, "format_cost": format_cost}
    indices, template = list(results[0].thumbnails), environment.get_template("card.html")

    @cache
    def card(index: int, is_whole: bool) -> Markup:
        return Markup(template.render(card=_prompt(results, index, is_whole)))

    shown = _fitting(indices, lambda index, is_whole: len(card(index, is_whole).encode()))
    tasks = [task for task in TASKS if any(task in result.tasks for result in results)]
    page = environment.get_template("page.html").render(
        about=evaluation.settings,
        warnings=evaluation.warnings,
        amount=evaluation.amount,
        run=run,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        files=[name for name in _FILES if (path.parent / name).is_file()],
        compute=Markup(compute_svg(compute)),
        results=results,
        costs=COSTS,
        cards=[card(index, is_whole) for index, is_whole in shown.items()],
        told=sum(shown.values()),
        left_out=len(indices) - len(shown),
        tasks=tasks,
        judges=list(dict.fromkeys(judge for result in results for i in indices for judge in result.traces[i].scores)),
    )
    write_text(path, page + "\n")


def _fitting(indices: Sequence[int], size: Callable[[int, bool], int]) -> dict[int, bool]:
    """Pick the prompts that the page has room for; those that are shown whole are True.

    Where not all can be whole, those that are take half of the room, or what all others leave of it; others are shown
    without how they were made.

    Args:
        indices: of the prompts.
        size: of a prompt in bytes, whole or not; few are asked for.
    """
    room = _MOST - 300_000  # for the plot, the table and the rest
    whole = _spread(indices, lambda index: size(index, True), room)
    if len(whole) == len(indices):
        return dict.fromkeys(whole, True)
    others_room = min(room // 2, len(indices) * size(indices[0], False))
    whole = _spread(indices, lambda index: size(index, True), room - others_room)
    room -= sum(size(index, True) for index in whole)
    others = _spread([index for index in indices if index not in whole], lambda index: size(index, False), room)
    return {index: index in whole for index in sorted([*whole, *others])}


def _spread(indices: Sequence[int], size: Callable[[int], int], room: int) -> list[int]:
    """Pick as many prompts, from all over, as fit into some bytes."""
    wanted = min(len(indices), room // size(indices[0])) if indices else 0
    while wanted:
        picked = [indices[i] for i in sorted(pick_prompt_indices(len(indices), wanted))]
        total = sum(map(size, picked))
        if total <= room:
            return picked
        wanted = min(wanted - 1, wanted * room // total)
    return []


def _prompt(results: Sequence[StrategyResult], index: int, is_whole: bool) -> dict[str, Any]:
    """What the page shows of a prompt: a panel for each strategy; how its image was made unless there is no room."""
    row = results[0].row_of(index)
    panels = [_panel(result, index) for result in results]
    for panel in [] if is_whole else panels:
        panel["sections"] = []
    for judge in dict.fromkeys(judge for panel in panels for judge in panel["scores"]):
        own = [panel for panel in panels if judge in panel["scores"]]
        for panel, text in zip(own, format_scores([panel["scores"][judge] for panel in own]), strict=True):
            panel["texts"][judge] = text
    return {"index": index, "prompt": row["prompt"], "task": row["tag"], "panels": panels}


def _panel(result: StrategyResult, index: int) -> dict[str, Any]:
    """What the page shows of one image."""
    row, trace, pixels = result.row_of(index), result.traces[index], result.thumbnails[index]
    height, width = pixels.shape[:2]
    found = [(name, box[:4], box[4]) for name, boxes in json.loads(row["details"]).items() for box in boxes]
    return {
        "strategy": result.name,
        "title": result.title,
        "correct": row["correct"],
        "verdict": plain_verdict(row),
        "picture": png(shrunk(pixels, _LARGEST)),
        "height": height,
        "width": width,
        "found": found,
        "numbers": _numbers([Box(*box) for _, box, _ in found], width, height),
        "scores": trace.scores,
        "texts": {},
        "sections": trace.sections,
    }


def _numbers(boxes: Sequence[Box], width: int, height: int) -> list[Box]:
    """Where the numbers of boxes go: beside them and on none of them, as far as the image has room."""
    size = height / 11
    sizes = [(0.62 * size * len(str(i)), 0.8 * size) for i in range(1, len(boxes) + 1)]
    return place_labels(boxes, sizes, Box(0, 0, width, height), gap=height / 64, near=0.1)


def _data(picture: bytes) -> Markup:
    """A PNG file as a URL that contains it."""
    return Markup("data:image/png;base64," + b64encode(picture).decode())


def _in_few_colors(picture: bytes) -> bytes:
    """The PNG file of a small picture in 128 colours, which no one sees, and which take less than half the bytes."""
    image = Image.open(io.BytesIO(picture))
    method = Image.Quantize.FASTOCTREE if image.mode == "RGBA" else Image.Quantize.MEDIANCUT
    file = io.BytesIO()
    image.quantize(128, method, dither=Image.Dither.NONE).save(file, format="PNG")
    return file.getvalue()


def _curve(curve: Curve) -> dict[str, Any]:
    """A curve's points in a square of 100 x 100, and the values at its edges: 0 and 1 where these hold it."""
    bottom, top = min(curve.low), max(curve.high)
    if bottom >= 0 and top <= 1:
        bottom, top = 0.0, 1.0

    def points(values: list[float]) -> list[str]:
        scale = 100 / (top - bottom or 1)
        return [
            f"{100 * i / (len(values) - 1):.1f},{100 - scale * (value - bottom):.1f}" for i, value in enumerate(values)
        ]

    band = points(curve.high) + points(curve.low)[::-1]
    return {"bottom": bottom, "top": top, "band": " ".join(band), "kept": " ".join(points(curve.kept))}
