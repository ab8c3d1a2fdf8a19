"""Prompts from files and data sets, and what makes them the official ones."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from datamodules.geneval_prompts import differences, prompts_from_dataset, prompts_from_file

GOLDEN = Path(__file__).parents[1] / "golden" / "geneval"


@pytest.fixture(scope="module")
def official() -> list[dict[str, Any]]:
    with gzip.open(GOLDEN / "evaluation_metadata.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_official_file_is_recognised(tmp_path: Path, official: list[dict[str, Any]]) -> None:
    assert len(official) == 553
    assert prompts_from_file(write(tmp_path / "all.jsonl", official), official=True) == official
    assert differences(official[::-1]) == []


def test_what_differs_from_the_official_prompts_is_said(tmp_path: Path, official: list[dict[str, Any]]) -> None:
    bench = repr(official[0]["prompt"])
    assert differences([*official, official[0]]) == [f"prompts that occur more than once: 1, such as {bench} 2 times"]
    assert differences([*official[1:], official[1]])[0] == "79 of 80 single_object prompts"
    reworded = [official[0] | {"prompt": "a very nice photo of a bench"}, *official[1:]]
    assert differences(reworded) == ["some have other words or clauses"]
    path = write(tmp_path / "most.jsonl", official[:-9])
    with pytest.raises(ValueError, match=r"these are not the official prompts: 91 of 100 color_attr prompts; for"):
        prompts_from_file(path, official=True)
    assert len(prompts_from_file(path)) == 544


def columns(rows: list[dict[str, Any]]) -> Dataset:
    """As a data set stores them: a position's index as text, missing keys as None."""
    stored = json.loads(json.dumps(rows))
    for row in stored:
        row.setdefault("exclude", None)
        for clause in row["include"]:
            for key in ("color", "position"):
                clause.setdefault(key, None)
            if clause["position"]:
                clause["position"][1] = str(clause["position"][1])
    return Dataset.from_list(stored)


def test_prompts_come_from_data_sets(tmp_path: Path, official: list[dict[str, Any]]) -> None:
    columns(official).save_to_disk(str(tmp_path / "columns"))
    assert prompts_from_dataset(str(tmp_path / "columns"), official=True) == official
    as_json = Dataset.from_dict({"metadata": [json.dumps(row) for row in official]})
    DatasetDict({"test": as_json}).save_to_disk(str(tmp_path / "json"))
    assert prompts_from_dataset(str(tmp_path / "json"), official=True) == official
    with pytest.raises(ValueError, match=r"json has no split 'train'; there are: test"):
        prompts_from_dataset(str(tmp_path / "json"), split="train")
    with pytest.raises(ValueError, match=r"columns, row 0: include\[0\]: unknown class 'bench'"):
        prompts_from_dataset(str(tmp_path / "columns"), class_names=["star"])
    Dataset.from_dict({"metadata": ["{"]}).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(ValueError, match=r"broken, row 0: metadata is not valid JSON"):
        prompts_from_dataset(str(tmp_path / "broken"))
