"""The page of an evaluation: one HTML file, with every picture inside, that shows what was made, how, and why."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from lightning_modules.files import write_text
from lightning_modules.report.drawing import Curve, format_score, png, shrunk
from lightning_modules.report.results import EvaluationResult, StrategyResult
from lightning_modules.rewards.geneval_rules import TASKS

_LARGEST = 256  # pixels along the longer side of an image


def write_page(path: Path, evaluation: EvaluationResult) -> None:
    """Write the page of the prompts that have thumbnails. It needs no server, no network, and no script to be read.

    Whatever comes from prompts is escaped by the template.
    """
    results = evaluation.strategies
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"data": _data, "format_score": format_score, "curve": _curve}
    first = next(iter(results.values()))
    cards = []
    for index in first.thumbnails:
        panels = [_panel(result, index) for result in results.values()]
        row = first.row_of(index)
        cards.append({"index": index, "prompt": row["prompt"], "task": row["tag"], "panels": panels})
    tasks = [task for task in TASKS if any(card["task"] == task for card in cards)]
    judges = list(dict.fromkeys(judge for card in cards for panel in card["panels"] for judge in panel["scores"]))
    page = environment.get_template("page.html").render(
        about=evaluation.settings, results=results, cards=cards, tasks=tasks, judges=judges
    )
    write_text(path, page + "\n")


def _panel(result: StrategyResult, index: int) -> dict[str, Any]:
    """What the page shows of one image."""
    row, trace, pixels = result.row_of(index), result.traces[index], result.thumbnails[index]
    boxes = [(name, *box) for name, found in json.loads(row["details"]).items() for box in found]
    return {
        "strategy": result.name,
        "correct": row["correct"],
        "reason": row["reason"],
        "picture": png(shrunk(pixels, _LARGEST)),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "boxes": boxes,
        "scores": trace.scores,
        "sections": trace.sections,
    }


def _data(picture: bytes) -> Markup:
    """A PNG file as a URL that contains it."""
    return Markup("data:image/png;base64," + b64encode(picture).decode())


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
