"""The report of an evaluation: all that it leaves in a folder."""

import json
from pathlib import Path

from lightning_modules.files import write_text
from lightning_modules.report.page import write_page
from lightning_modules.report.pictures import contact_sheet, plot_compute, save_image
from lightning_modules.report.results import EvaluationResult, result_line


def write_report(folder: Path, evaluation: EvaluationResult) -> None:
    """Write geneval.json, results.jsonl, compute.png, sheets/NAME.png and page.html into a folder."""
    results = evaluation.strategies
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
    about = {**evaluation.settings, "warnings": evaluation.warnings}
    report = {"benchmark": "GenEval", **about, "strategies": strategies}
    write_text(folder / "geneval.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "results.jsonl", "\n".join(lines) + "\n")
    write_page(folder / "page.html", evaluation)
