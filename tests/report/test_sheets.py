"""Sheets of images."""

import re

import numpy as np
import pytest
from PIL import ImageDraw

from lightning_modules.report import sheets as module
from lightning_modules.report.sheets import contact_sheet, sheets, side_by_side, wrapped
from lightning_modules.rewards.geneval_metadata import TASKS
from tests.helpers.results import RUN, make_evaluation, make_result

GREEN, RED = (0x17, 0x70, 0x3A), (0xB3, 0x26, 0x1E)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[float, float], str, float]]:
    """Where each line of text was written, what, and how wide it is."""
    lines = []
    text = ImageDraw.ImageDraw.text

    def noted(draw: ImageDraw.ImageDraw, at: tuple[float, float], line: str, **how) -> None:
        lines.append((at, line, how["font"].getlength(line)))
        text(draw, at, line, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return lines


def test_a_sheet_says_whose_images_it_shows_and_what_is_wrong(written: list) -> None:
    result = make_result([True] * 6 + [False] * 2, name="verified_before_training")
    sheet = contact_sheet(result, "parm, last.ckpt")
    texts = [line for _, line, _ in written]
    title = " ".join(texts[:3])
    assert "verified (before training): GenEval 0.750" in title and "parm, last.ckpt" in texts
    assert texts.count("✗ needs 3 diamonds,") + texts.count("✗ needs 3 diamonds, has 5") == 1
    assert texts.count("✓ correct") == 3
    assert all(x + width <= sheet.width for (x, _), _, width in written)  # nothing is cut off
    pixels = np.asarray(sheet)
    assert (pixels == GREEN).all(-1).sum() > (pixels == RED).all(-1).sum() > 1000


@pytest.mark.parametrize(("prompts", "columns"), [(1, 1), (3, 3), (8, 4), (12, 6), (14, 7), (36, 6)])
def test_rows_are_full(prompts: int, columns: int) -> None:
    result = make_result([True] * prompts, per_prompt=1, tasks=TASKS[:1])
    sheet = np.asarray(contact_sheet(result, ""))
    green = (sheet == GREEN).all(-1)
    last = green[np.nonzero(green.sum(1) > 100)[0][-1]]  # the lower edge of the last row's frames
    assert int((np.diff(last.astype(int)) == 1).sum()) == columns


def test_words_that_are_too_long_are_broken_and_not_cut_off() -> None:
    lines = wrapped("a strategy_of_a_very_long_name_before_training here", 90, 12)
    assert "".join(lines).replace(" ", "") == "astrategy_of_a_very_long_name_before_traininghere"
    assert all(module._font(12, False).getlength(line) <= 90 for line in lines)
    assert any(line.endswith("_") for line in lines)


def test_side_by_side_shows_the_first_prompts_of_each_task_by_every_strategy(written: list) -> None:
    good, bad = (make_result([right] * 36, 1, name, tasks=TASKS) for right, name in ((True, "good"), (False, "bad")))
    sheet = side_by_side(make_evaluation({"good": good, "bad": bad}), RUN)
    texts = [line for _, line, _ in written]
    numbers = [int(found) for found in re.findall(r"number (\d+)", " ".join(texts))]
    assert numbers == [0, 1, 6, 7, 12, 13, 18, 19, 24, 25, 30, 31]
    assert "first 2 prompts of each task" in " ".join(texts)
    assert texts.count("✓ correct") == 12 and sum(line.startswith("✗ needs") for line in texts) == 12
    assert "GenEval 1.000" in texts and "GenEval 0.000" in texts
    assert "good" in texts and "bad" in texts and texts.index("good") < texts.index("bad")
    assert all(x + width <= sheet.width for (x, _), _, width in written)


def test_of_one_prompt_a_task_correct_images_are_counted(written: list) -> None:
    few = make_result([True] * 4 + [False] * 2, 1, "few", tasks=TASKS)
    side_by_side(make_evaluation({"few": few}), RUN)
    texts = [line for _, line, _ in written]
    assert "4 of 6 correct" in texts and "the first prompt of each task," in " ".join(texts)


def test_every_strategy_has_a_sheet_and_all_share_one() -> None:
    results = {name: make_result([True, False] * 4, name=name) for name in ("one", "two")}
    assert list(sheets(make_evaluation(results), RUN)) == ["one", "two", "side_by_side"]


def test_photographs_keep_their_proportions() -> None:
    result = make_result([True], 1, tasks=TASKS[:1])
    result.thumbnails[0] = np.full((300, 600, 3), 7, np.uint8)
    pixels = np.asarray(contact_sheet(result, ""))
    rows, columns = np.nonzero((pixels == 7).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (256, 128)
