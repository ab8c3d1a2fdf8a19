"""GenEval's rules against answers of the official script, and the clause labels and prompt checks by hand."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, read_prompts, validate_metadata
from lightning_modules.rewards.geneval_rules import CLAUSES, Detections, GenEvalRules, Verdict, relations

GOLDEN = Path(__file__).parents[1] / "golden" / "geneval"
OPTIONS = {
    "threshold": float,
    "counting_threshold": float,
    "max_objects": int,
    "max_overlap": float,
    "position_threshold": float,
}


def golden_cases(name: str) -> list[Any]:
    with gzip.open(GOLDEN / name, "rt", encoding="utf-8") as file:
        return [pytest.param(case, id=case["id"]) for case in map(json.loads, file)]


def detections(objects: list[dict[str, Any]]) -> Detections:
    colors = [entry.get("color", "red") for entry in objects]
    return Detections(
        classes=[entry["class"] for entry in objects],
        scores=np.array([entry.get("score", 0.95) for entry in objects], dtype=np.float32),
        boxes=np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4),
        colors=lambda indices: [colors[index] for index in indices],
    )


def comparable(line: str) -> tuple[str, frozenset[str]]:
    """A reason line with the relations found taken out: the official script joins them in no fixed order."""
    match = re.fullmatch(r"(expected .+ target, found )(.*)( target)", line)
    if match is None:
        return line, frozenset()
    return match[1] + match[3], frozenset(match[2].split(" and "))


@pytest.mark.parametrize("case", [*golden_cases("cases.jsonl.gz"), *golden_cases("cases_options.jsonl.gz")])
def test_agrees_with_the_official_script(case: dict[str, Any]) -> None:
    rules = GenEvalRules(**{key: OPTIONS[key](value) for key, value in case["options"].items()})
    verdict = rules.evaluate(case["metadata"], detections(case["detections"]))
    expected = case["expected"]
    assert verdict.correct is expected["correct"]
    lines = verdict.reason.split("\n") if verdict.reason else []
    assert list(map(comparable, lines)) == list(map(comparable, expected["reason_lines"]))
    assert list(verdict.details) == list(expected["details"])
    for name, rows in expected["details"].items():
        np.testing.assert_allclose(verdict.details[name], rows, rtol=1e-7)
    assert (verdict.share == 1) == verdict.correct
    server = case.get("reward_server", {"error": "asked for the default options only"})
    assert "error" in server or verdict.strict == bool(server["strict"])
    if len(case["metadata"].get("include", [])) <= 2:
        asked = [label for label in verdict.clauses if not math.isnan(label)]
        assert all(asked) == verdict.correct, "an image is correct when it meets every clause asked"


CAT = {"class": "cat", "bbox": [0, 0, 10, 10], "color": "black"}
DOG = {"class": "dog", "bbox": [100, 0, 110, 10], "color": "white"}


def judge(objects: list[dict[str, Any]], tag: str = "two_object", **clauses: Any) -> Verdict:
    return GenEvalRules().evaluate({"tag": tag, "prompt": "", **clauses}, detections(objects))


def labels(verdict: Verdict) -> dict[str, float]:
    """The labels of what was asked."""
    named = dict(zip(CLAUSES, verdict.clauses, strict=True))
    return {name: value for name, value in named.items() if not math.isnan(value)}


def test_labels_of_colors() -> None:
    include = [{"class": "cat", "count": 1, "color": "black"}, {"class": "dog", "count": 1, "color": "red"}]
    assert labels(judge([CAT, DOG], include=include)) == {
        "object_1": 1,
        "color_1": 1,
        "object_2": 1,
        "color_2": 0,
    }
    assert labels(judge([DOG], include=include)) == {"object_1": 0, "color_1": 0, "object_2": 1, "color_2": 0}


def test_labels_of_a_relation() -> None:
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    assert labels(judge([CAT, DOG], include=include)) == {"object_1": 1, "object_2": 1, "relation": 1}
    assert labels(judge([DOG], include=include)) == {"object_1": 0, "object_2": 1, "relation": 0}
    assert labels(judge([CAT], include=include)) == {"object_1": 1, "object_2": 0, "relation": 0}
    include[1]["position"] = ["above", 0]
    verdict = judge([CAT, DOG], include=include)
    assert labels(verdict) == {"object_1": 1, "object_2": 1, "relation": 0}
    assert verdict.reason == "expected dog above target, found right of target"


@pytest.mark.parametrize(("present", "enough", "exact"), [(1, 0, 1), (2, 1, 1), (3, 1, 0)])
def test_labels_of_a_count(present: int, enough: float, exact: float) -> None:
    clauses = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    verdict = judge([CAT] * present, tag="counting", **clauses)
    assert labels(verdict) == {"object_1": enough, "exact_count": exact}
    assert verdict.correct is (present == 2)


def test_everything_required_counts_once_in_the_share() -> None:
    include: list[dict[str, Any]] = [{"class": "cat", "count": 1}]
    include.append({"class": "dog", "count": 1, "position": ["above", 0]})
    assert judge([CAT, DOG], include=include).share == pytest.approx(2 / 3)  # a wrong relation earns nothing
    assert judge([DOG], include=include).share == pytest.approx(1 / 3)
    assert judge([], include=include).share == 0
    colored = [{"class": name, "count": 1, "color": color} for name, color in (("cat", "black"), ("dog", "red"))]
    assert judge([CAT, DOG], include=colored).share == 0.75
    assert judge([DOG], include=[*include, {"class": "bird", "count": 1, "color": "red"}]).share == 0.2
    crowd = judge([CAT] * 9, include=[{"class": "cat", "count": 2}], exclude=[{"class": "cat", "count": 3}])
    assert crowd.share == 0.5  # and not below zero, however many there are


def test_nothing_asked_has_no_labels() -> None:
    assert labels(judge([CAT])) == {}
    assert judge([CAT]).correct


def test_two_relations_are_printed_sorted() -> None:
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["below", 0]}]
    reason = judge([{**CAT, "bbox": [100, 100, 110, 110]}, {**DOG, "bbox": [0, 0, 10, 10]}], include=include).reason
    assert reason == "expected dog below target, found above and left of target"


def test_relations_need_more_than_half_of_the_offset() -> None:
    point, target = np.array([6, 8, 6, 8], np.float32), np.zeros(4, np.float32)
    assert relations(point, target) == {"right of", "below"}
    assert relations(target, target) == set()
    # Offset (5, 12) has length 13: 5 of 13 is not enough to be right of.
    assert relations(np.array([5, 12, 5, 12], np.float32), target) == {"below"}
    # Offset (1, sqrt 3) has length 2 in float32, so x is exactly half; float64 would see a bit more.
    at_half = np.array([1, np.sqrt(3)] * 2, np.float32)
    assert relations(at_half, target) == {"below"}


def test_colors_are_asked_only_for_objects_that_need_one() -> None:
    asked: list[list[int]] = []

    def colors(indices: Any) -> list[str]:
        asked.append(list(indices))
        return ["black"] * len(indices)

    seen = detections([DOG, CAT, {**CAT, "score": 0.99}])
    lazy = Detections(seen.classes, seen.scores, seen.boxes, colors)
    include = [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "color": "black"},
        {"class": "bird", "count": 1, "color": "red"},
    ]
    GenEvalRules().evaluate({"tag": "colors", "include": include}, lazy)
    assert asked == [[2]]


def test_a_world_with_its_own_classes() -> None:
    rules = GenEvalRules(class_names=("star", "circle"))
    objects = [{**CAT, "class": "circle"}, {**DOG, "class": "star"}]
    verdict = rules.evaluate({"tag": "colors", "include": [{"class": "star", "count": 1}]}, detections(objects))
    assert verdict.correct
    assert list(verdict.details) == ["star", "circle"]
    with pytest.raises(KeyError, match="cat"):
        rules.evaluate({"tag": "colors"}, detections([CAT]))


def prompt(**changes: Any) -> dict[str, Any]:
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]
    return {"tag": "position", "prompt": "a photo of a dog above a cat", "include": include, **changes}


def clause(**changes: Any) -> dict[str, Any]:
    return prompt(include=[{"class": "cat", "count": 1}, {"class": "dog", "count": 1, **changes}])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (["cat"], "expected a JSON object, found ['cat']"),
        (prompt(tag=None), "there is no tag; it is one of single_object,"),
        (prompt(tag="positions"), "unknown tag 'positions'"),
        (prompt(tag=["position"]), "unknown tag ['position']"),
        (prompt(prompt=" "), "prompt must be a non-empty text, found ' '"),
        (prompt(prompt=None), "prompt must be a non-empty text, found None"),
        (prompt(include=[]), "include must be a non-empty list, found []"),
        (prompt(include={"class": "cat", "count": 1}), "include must be a non-empty list"),
        (prompt(include=["cat"]), "include[0]: expected an object, found 'cat'"),
        (prompt(exclude=None), "exclude must be a list, found None"),
        (
            prompt(exclude=[{"class": "cat", "count": 0}]),
            "exclude[0]: count must be a whole number of at least 1",
        ),
        (prompt(exclude=[{"class": "cat", "count": 1, "color": "red"}]), "exclude[0]: unknown key 'color'"),
        (prompt(exclud=[{"class": "cat", "count": 1}]), "unknown key 'exclud', probably 'exclude'"),
        (clause(colour="red"), "include[1]: unknown key 'colour', known are class, count, color, position"),
        (clause(**{"class": "mouse"}), "include[1]: unknown class 'mouse'"),
        (clause(**{"class": ["dog"]}), "include[1]: unknown class ['dog']"),
        (clause(count=0), "include[1]: count must be a whole number of at least 1, found 0"),
        (clause(count=True), "include[1]: count must be a whole number of at least 1, found True"),
        (clause(count="2"), "include[1]: count must be a whole number of at least 1, found '2'"),
        (clause(color="gray"), "include[1]: unknown color 'gray', known are red, orange"),
        (clause(position="above"), "include[1]: position must be [relation, index of an earlier include]"),
        (clause(position=["over", 0]), "include[1]: unknown relation 'over', known are left of, right of"),
        (
            clause(position=["above", 1]),
            "include[1]: position must refer to an earlier include by its index, found 1",
        ),
        (clause(position=["above", -1]), "include[1]: position must refer to an earlier include"),
        (clause(position=["above", None]), "include[1]: position must refer to an earlier include"),
    ],
)
def test_broken_prompts_are_refused(row: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"prompts.jsonl:7: {complaint}")) as error:
        validate_metadata(row, CLASS_NAMES, "prompts.jsonl:7")
    assert "\n" not in str(error.value)


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [prompt(), prompt(prompt="a line separator \u2028 inside")]
    # A blank last line is common, and U+2028 does not end a line of JSONL.
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_prompts(path) == rows
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: include[0]: unknown class 'cat'")):
        read_prompts(path, class_names=["dog"])


def test_unreadable_prompt_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(FileNotFoundError, match="there is no such file of GenEval prompts"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="the file has no prompts"):
        read_prompts(path)
    for broken in (b'{"tag": ', b'"\xff"'):
        path.write_bytes(json.dumps(prompt()).encode() + b"\n" + broken)
        with pytest.raises(ValueError, match=re.escape(f"{path}:2: not valid JSON")):
            read_prompts(path)
