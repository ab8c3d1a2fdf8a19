"""The report of an evaluation: all that it leaves in a folder."""

from pathlib import Path

from lightning_modules.files import write_text
from lightning_modules.report.compute_plot import compute_figure
from lightning_modules.report.page import write_page
from lightning_modules.report.pictures import save_figure, save_image
from lightning_modules.report.results import EvaluationResult, RunInfo, result_line, write_report_json
from lightning_modules.report.sheets import sheets


def write_report(folder: Path, evaluation: EvaluationResult, run: RunInfo) -> None:
    """Write geneval.json, results.jsonl, compute.png, page.html, sheets/NAME.png and sheets/side_by_side.png."""
    results = evaluation.strategies
    strategies = {}
    lines = []
    for name, result in results.items():
        strategies[name] = {
            "overall": result.overall,
            "interval_95": list(result.interval()),
            "tasks": result.tasks,
            **{f"{cost}_per_image": value for cost, value in result.costs().items()},
            "tokens_per_image": result.tokens,
            "image_decodes_per_image": result.image_decodes,
            "objects_per_image": result.objects,
            "independent": result.independent,
            "stats": result.stats,
        }
        lines += [result_line(row | {"filename": f"{name}/{row['filename']}"}) for row in result.rows]
    about = {**evaluation.settings, "warnings": evaluation.warnings}
    report = {"benchmark": "GenEval", **about, "strategies": strategies}
    write_report_json(folder / "geneval.json", report)
    write_text(folder / "results.jsonl", "\n".join(lines) + "\n")
    pictures = sheets(evaluation, run)
    for name, picture in pictures.items():
        save_image(picture, folder / "sheets" / f"{name}.png")
    for sheet in (folder / "sheets").glob("*.png"):
        if sheet.stem not in pictures:  # of an earlier test of this run, which other weights took
            sheet.unlink(missing_ok=True)
    figure = compute_figure(evaluation, run)
    save_figure(figure, folder / "compute.png")
    write_page(folder / "page.html", evaluation, run, figure)
