"""Tables of results, on the console and as CSV files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.files import whole
from lightning_modules.report.results import COSTS, StrategyResult, format_cost
from lightning_modules.rewards.geneval_metadata import TASKS

_HEADINGS = ("single", "two", "count", "colors", "position", "attr.")  # of TASKS, in its order


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a table, whose columns are the keys of its first row, whole or not at all."""
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(results: Mapping[str, StrategyResult]) -> None:
    """Print strategies x tasks, with intervals, costs (unless all are unknown) and what other judges say."""
    table = Table(title="GenEval, and costs of an image", box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    costly = any(result.decoder_passes for result in results.values())
    judges = list(dict.fromkeys(judge for result in results.values() for judge in result.independent))
    for heading in (
        "overall",
        "95 %",
        *_HEADINGS,
        *((name.replace(" ", "\n") for name in COSTS.values()) if costly else ()),
        *judges,
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    untrained = False
    for result in results.values():
        if result.is_untrained != untrained:
            untrained = not untrained
            table.add_section()
            table.add_row("before training" if untrained else "after training", style="italic")
        low, high = result.interval()
        tasks = [f"{result.tasks[task]:.2f}" if task in result.tasks else "-" for task in TASKS]
        costs = [format_cost(name, cost) for name, cost in result.costs().items()]
        independent = [f"{result.independent[judge]:.3f}" if judge in result.independent else "-" for judge in judges]
        scores = f"{result.overall:.3f}", f"{low:.2f}-{high:.2f}", *tasks
        table.add_row(result.row_title, *scores, *(costs if costly else ()), *independent)
    print_plain(table)


def print_plain(table: Table) -> None:
    """Print a table as wide as it is, with names as they are: `[bold]` and `:star:` are no markup."""
    Console(width=10_000, markup=False, emoji=False, highlight=False).print(table)
