"""What an evaluation writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_modules.report.drawing import TraceView
from lightning_modules.report.pictures import contact_sheet, pick_prompt_indices
from lightning_modules.report.report import write_report
from lightning_modules.report.results import EvaluationResult, StrategyResult
from lightning_modules.report.tables import print_table


def result(correct: list[bool], per_prompt: int = 2) -> StrategyResult:
    rows = [
        {
            "filename": f"{i // per_prompt:05d}/samples/{i % per_prompt:04d}.png",
            "tag": "colors" if i < len(correct) // 2 else "position",
            "prompt": f"a photo of a thing number {i // per_prompt}",
            "correct": right,
            "reason": "" if right else "expected thing>=1, found 0",
            "metadata": "{}",
            "details": "{}",
        }
        for i, right in enumerate(correct)
    ]
    half = len(correct) // 2
    tasks = {"colors": float(np.mean(correct[:half])), "position": float(np.mean(correct[half:]))}
    image = np.full((64, 64, 3), 128, np.uint8)
    return StrategyResult(
        "parm",
        float(np.mean(list(tasks.values()))),
        tasks,
        rows,
        {0: image, 3: image},
        128,
        8,
        0.1,
        1.5,
        {},
        traces={i: TraceView({}, []) for i in (0, 3)},
    )


def test_report_files(tmp_path: Path) -> None:
    results = {"sample": result([True] * 10 + [False] * 10), "parm": result([True] * 20)}
    about = {"prompts": 10, "images_per_prompt": 2, "seed": 3, "decoder": "Decoder"}
    write_report(tmp_path, EvaluationResult(about, ["odd"], results))
    report = json.loads((tmp_path / "geneval.json").read_text())
    assert report["benchmark"] == "GenEval" and report["seed"] == 3 and report["warnings"] == ["odd"]
    assert report["strategies"]["sample"]["overall"] == 0.5
    assert report["strategies"]["sample"]["interval_95"] == [0.5, 0.5]
    assert report["strategies"]["parm"]["tasks"] == {"colors": 1.0, "position": 1.0}
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert Image.open(tmp_path / "sheets" / "parm.png").size[0] > 300
    assert not list(tmp_path.rglob("*.partial"))
    write_report(tmp_path, EvaluationResult(about, [], {"parm": results["parm"]}))
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["parm.png"]


def test_interval_resamples_prompts_and_not_images() -> None:
    together = result([True, True, False, False] * 20)
    apart = result([True, False, True, False] * 20)
    assert together.overall == apart.overall == 0.5
    low, high = together.interval()
    assert 0.3 < low < 0.42 and 0.58 < high < 0.7
    assert apart.interval() == (
        0.5,
        0.5,
    )  # every prompt has one right image: resampling prompts changes nothing


def test_one_prompt_of_a_task_says_nothing_of_others() -> None:
    assert result([True] * 4).interval() == (0.0, 1.0)  # two images of a prompt in each task
    assert result([True] * 8).interval() == (1.0, 1.0)


def test_wrong_images_are_framed_red_with_their_reason() -> None:
    sheet = np.asarray(contact_sheet(result([True] * 6 + [False] * 2)))
    assert (sheet == (255, 0, 0)).all(-1).sum() > 200
    assert (sheet == (0, 128, 0)).all(-1).sum() > 200


def test_table_shows_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"best_of_8_likelihood": result([True] * 8)})
    assert "best_of_8_likelihood" in capsys.readouterr().out


def test_the_gain_over_another_strategy_is_paired_by_prompt() -> None:
    base, better = result([True, False] * 10), result([True, True] * 10)
    same = base.gain_over(base)
    assert same == (0.0, 0.0, 0.0)  # unpaired resamples would differ
    assert better.gain_over(base) == (0.5, 0.5, 0.5)  # each prompt gains one of its two images


def test_sheets_show_different_prompts_where_prompts_repeat_in_turn() -> None:
    shown = pick_prompt_indices(300, 36)
    assert len(shown) == 36 and max(shown) < 300
    assert len({index % 8 for index in shown if index < 50}) > 2  # 50 rows of the 8 single-object prompts
    assert pick_prompt_indices(5, 36) == set(range(5)) and pick_prompt_indices(5, 0) == set()
