"""What an evaluation writes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lightning_modules.report.pictures import pick_prompt_indices
from lightning_modules.report.report import write_report
from lightning_modules.report.results import write_report_json
from lightning_modules.report.tables import print_table
from tests.helpers.results import RUN, make_evaluation, make_result


def test_report_files(tmp_path: Path) -> None:
    results = {"sample": make_result([True] * 10 + [False] * 10), "parm": make_result([True] * 20)}
    write_report(tmp_path, make_evaluation(results), RUN)
    report = json.loads((tmp_path / "geneval.json").read_text())
    assert report["benchmark"] == "GenEval" and report["seed"] == 3 and report["warnings"] == ["odd"]
    sample = report["strategies"]["sample"]
    assert sample["overall"] == 0.5 and sample["interval_95"] == [0.5, 0.5]
    costs = {"decoder_passes_per_image": 128, "verifier_calls_per_image": 8, "seconds_per_image": 0.1}
    assert sample.items() >= costs.items()
    assert report["strategies"]["parm"]["tasks"] == {"colors": 1.0, "position": 1.0}
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    for name in ("compute", "sheets/sample", "sheets/parm", "sheets/side_by_side"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 300
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert not list(tmp_path.rglob("*.partial"))
    write_report(tmp_path, make_evaluation({"parm": results["parm"]}), RUN)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["parm.png", "side_by_side.png"]


def test_without_prompts_to_show_there_are_numbers_and_no_sheets(tmp_path: Path) -> None:
    result = replace(make_result([True] * 8), thumbnails={}, traces={})
    write_report(tmp_path, make_evaluation({"parm": result}), RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compute.png", "geneval.json", "page.html", "results.jsonl"
    ]  # fmt: skip


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    evaluation = make_evaluation({"sample": make_result([True] * 10 + [False] * 10, name="sample")})
    for name in ("one", "two"):
        write_report(tmp_path / name, evaluation, RUN)
    for file in ("compute.png", "sheets/sample.png", "sheets/side_by_side.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_interval_resamples_prompts_and_not_images() -> None:
    together = make_result([True, True, False, False] * 20)
    apart = make_result([True, False, True, False] * 20)
    assert together.overall == apart.overall == 0.5
    low, high = together.interval()
    assert 0.3 < low < 0.42 and 0.58 < high < 0.7
    assert apart.interval() == (
        0.5,
        0.5,
    )  # every prompt has one right image: resampling prompts changes nothing


def test_one_prompt_of_a_task_says_nothing_of_others() -> None:
    assert make_result([True] * 4).interval() == (0.0, 1.0)  # two images of a prompt in each task
    assert make_result([True] * 8).interval() == (1.0, 1.0)


def test_table_shows_every_strategy_and_its_costs(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"best_of_8_likelihood": make_result([True] * 8, name="best_of_8_likelihood")})
    printed = capsys.readouterr().out
    (row,) = [line.split() for line in printed.splitlines() if "best_of_8_likelihood" in line]
    assert row[-3:] == ["128", "8", "0.100"]
    first, second = printed.splitlines()[2:4]
    assert first.split()[-2:] == ["decoder", "verifier"] and second.split()[-3:] == ["passes", "calls", "seconds"]


def test_the_gain_over_another_strategy_is_paired_by_prompt() -> None:
    base, better = make_result([True, False] * 10), make_result([True, True] * 10)
    same = base.gain_over(base)
    assert same == (0.0, 0.0, 0.0)  # unpaired resamples would differ
    assert better.gain_over(base) == (0.5, 0.5, 0.5)  # each prompt gains one of its two images


def test_sheets_show_different_prompts_where_prompts_repeat_in_turn() -> None:
    shown = pick_prompt_indices(300, 36)
    assert len(shown) == 36 and max(shown) < 300
    assert len({index % 8 for index in shown if index < 50}) > 2  # 50 rows of the 8 single-object prompts
    assert pick_prompt_indices(5, 36) == set(range(5)) and pick_prompt_indices(5, 0) == set()


@pytest.mark.parametrize("name", ["cfg 7.5 [best]", "[red]a :star:" + 20 * " long"])
def test_names_reach_the_console_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table({name: make_result([True] * 4, name=name)})
    rows = [line for line in capsys.readouterr().out.splitlines() if " 1.000 " in line]
    assert len(rows) == 1 and rows[0].startswith(f" {name} ") and "…" not in rows[0]


def test_numbers_of_the_report_have_six_decimals(tmp_path: Path) -> None:
    report = {"a": 0.8539999723434448, "b": [{"c": 1 / 3}], "n": 3, "d": (2.0,), "e": math.nan}
    write_report_json(tmp_path / "geneval.json", report)
    assert json.loads((tmp_path / "geneval.json").read_text(), parse_constant=pytest.fail) == {
        "a": 0.854,
        "b": [{"c": 0.333333}],
        "n": 3,
        "d": [2.0],
        "e": None,
    }
