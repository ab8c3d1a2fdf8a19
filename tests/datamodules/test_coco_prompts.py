"""Prompts about COCO's classes: GenEval's own, and others that share nothing with them that a model could learn."""

from typing import Any

import pytest

from datamodules.coco_prompts import official_prompts, prompt_pool
from datamodules.geneval_prompts import differences, prompts_from_coco, prompts_from_file
from datamodules.prompt_templates import SPLITS, make_row
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, TASKS, validate_metadata


def named(rows: Any) -> tuple[set, ...]:
    """Prompts, class-colour pairs, class pairs, class-relation-class triples and counts that rows name."""
    prompts, colors, pairs, triples, counts = (set() for _ in range(5))
    for row in rows:
        clauses = row["include"]
        prompts.add(row["prompt"])
        colors |= {(clause["class"], clause["color"]) for clause in clauses if "color" in clause}
        if row["tag"] == "two_object":
            pairs.add(frozenset(clause["class"] for clause in clauses))
        if row["tag"] == "position":
            triples.add((clauses[1]["class"], clauses[1]["position"][0], clauses[0]["class"]))
        if row["tag"] == "counting":
            counts.add((clauses[0]["class"], clauses[0]["count"]))
    return prompts, colors, pairs, triples, counts


def test_the_bundled_prompts_are_the_official_ones_and_say_what_the_templates_say() -> None:
    assert differences(official_prompts()) == []
    assert [make_row(row["tag"], *row["include"]) for row in official_prompts()] == list(official_prompts())
    assert prompts_from_file("bundled:geneval_prompts", official=True) == list(official_prompts())
    few = prompts_from_file("bundled:geneval_prompts", official=True, per_task={"colors": 2})
    assert few == [row for row in official_prompts() if row["tag"] == "colors"][:2]
    assert prompts_from_coco("evaluation", None) == list(official_prompts())


def test_no_split_shares_a_prompt_or_a_combination_with_another_one() -> None:
    found = [named(prompts_from_coco(split, None)) for split in SPLITS]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for mine, other in zip(found[first], found[second], strict=True):
            assert mine and other and not mine & other


@pytest.mark.parametrize("split", ["train", "validation"])
def test_prompts_are_valid_distinct_and_the_same_each_time(split: Any) -> None:
    rows = prompts_from_coco(split, dict.fromkeys(TASKS[1:], 30))
    assert len({row["prompt"] for row in rows}) == len(rows) == 150
    for row in rows:
        validate_metadata(row, CLASS_NAMES, "row")
    prompt_pool.cache_clear()
    assert prompts_from_coco(split, 30) == rows


def test_single_objects_are_for_evaluation_alone() -> None:
    with pytest.raises(ValueError, match=r"names the task 'single_object'; there are: two_object, counting, colors"):
        prompts_from_coco("train", {"single_object": 1})
    with pytest.raises(ValueError, match=r"split must be one of train, validation, evaluation, not 'test'"):
        prompts_from_coco("test", 1)  # type: ignore[arg-type]
