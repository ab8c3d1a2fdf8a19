"""What is wrong with an image, said plainly."""

import json

import pytest

from lightning_modules.report.verdicts import plain_verdict

THREE = {"include": [{"class": "diamond", "count": 3}], "exclude": [{"class": "diamond", "count": 4}]}
ONE = {"include": [{"class": "cross", "count": 1}]}
BESIDE = {
    "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["left of", 0]}],
}


@pytest.mark.parametrize(
    ("metadata", "reason", "said"),
    [
        (THREE, "expected diamond<4, found 4", "needs 3 diamonds, has 4"),
        (THREE, "expected diamond>=3, found 2", "needs 3 diamonds, has 2"),
        (THREE, "expected diamond<2, found 4", "needs fewer than 2 diamonds, has 4"),
        (ONE, "expected star<1, found 2", "should have no star, has 2"),
        (ONE, "expected cross>=1, found 0", "needs 1 cross, has none"),
        (ONE, "expected cross>=2, found 0", "needs 2 crosses, has none"),
        (ONE, "expected baseball bat>=2, found 1", "needs 2 baseball bats, has 1"),
        (ONE, "expected person>=2, found 1", "needs 2 people, has 1"),
        (ONE, "expected red cross>=1, found 0 red; and 1 blue", "cross should be red, is blue"),
        (ONE, "expected red cross>=2, found 1 red; and 1 red, 1 blue", "needs 2 red crosses, has 1 red, 1 blue"),
        (ONE, "expected red cross>=1, found 0 red; and ", "needs 1 red cross, has none"),
        (
            BESIDE,
            "expected star left of target, found right of target",
            "star is right of the circle, should be left of it",
        ),
        (
            BESIDE,
            "expected star left of target, found above and right of target",
            "star is above and right of the circle, should be left of it",
        ),
        (BESIDE, "expected star left of target, found  target", "star is not clearly left of the circle"),
        (BESIDE, "expected circle>=1, found 0\nno target for star to be left of", "needs 1 circle, has none"),
        (BESIDE, "no target for star to be left of", "no circle for the star to be left of"),
        (ONE, "something new", "something new"),
        (
            ONE,
            "expected cross>=1, found 0\nexpected star>=1, found 0",
            "needs 1 cross, has none\nneeds 1 star, has none",
        ),
    ],
)
def test_official_reasons_are_said_plainly(metadata: dict, reason: str, said: str) -> None:
    assert plain_verdict({"correct": False, "reason": reason, "metadata": json.dumps(metadata)}) == said


def test_a_correct_image_is_correct() -> None:
    assert plain_verdict({"correct": True, "reason": "", "metadata": "{}"}) == "correct"
