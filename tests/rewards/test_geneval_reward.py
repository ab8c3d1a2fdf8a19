"""GenEval as a reward: its kinds, the self-test, detections made elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.shapes.detector import ShapesDetector
from datamodules.shapes.scenes import ShapesStream
from datamodules.shapes.world import Scene, SceneObject, render
from lightning_modules.files import BUNDLED
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.geneval_rules import Detections
from lightning_modules.rewards.self_test import SelfTest
from lightning_modules.rewards.stored_detections import StoredDetections
from tests.helpers.stop_sign import stop_sign

TWO_STARS = {
    "tag": "two_object",
    "include": [{"class": "star", "count": 1}, {"class": "circle", "count": 1}],
    "prompt": "a photo of a star and a circle",
}


def test_kinds_share_their_detector() -> None:
    scene = Scene((SceneObject("star", "red", 16, 16, 8), SceneObject("star", "red", 48, 48, 8)), 0)
    pixels = torch.from_numpy(render(scene)).permute(2, 0, 1)[None] / 255
    kinds = GenEvalReward(ShapesDetector()).kinds()
    assert list(kinds) == ["geneval", "strict", "clauses"]
    assert len({id(reward.detector) for reward in kinds.values()}) == 1
    one = {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"}
    assert [float(reward([one], pixels)) for reward in kinds.values()] == [1, 0, 1]
    assert [float(reward([TWO_STARS], pixels)) for reward in kinds.values()] == [0, 0, 0.5]
    with pytest.raises(ValueError, match=r"is one of correct, strict, clauses, not 'dense'"):
        GenEvalReward(ShapesDetector(), kind="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"geneval.reward.options: unknown option 'confidence', known are threshold, "):
        GenEvalReward(ShapesDetector(), options={"confidence": 0.5})
    with pytest.raises(ValueError, match=r"geneval.reward.options.threshold must be a number from 0 to 1, not 'high'"):
        GenEvalReward(ShapesDetector(), options={"threshold": "high"})
    with pytest.raises(ValueError, match=r"geneval.reward.options.max_objects must be a whole number of at least"):
        GenEvalReward(ShapesDetector(), options={"max_objects": 1.5})


def test_images_of_any_sizes_keep_their_order() -> None:
    class Sizes:
        class_names = ("star",)
        image_size = None
        name = "sizes"

        def cache_key(self) -> dict[str, Any]:
            return {}

        def to(self, device: object) -> "Sizes":
            return self

        def __call__(self, images: np.ndarray) -> list[Detections]:
            box = np.array([[0, 0, *images.shape[1:3]]], np.float32)
            return [Detections(["star"], np.ones(1, np.float32), box) for _ in images]

    images = [np.zeros((side, 8, 3), np.uint8) for side in (4, 6, 4, 5)]
    assert [found.boxes[0, 2] for found in GenEvalReward(Sizes()).detect(images)] == [4, 6, 4, 5]


def test_the_bundled_picture_is_our_own_drawing() -> None:
    objects = [("star", "green", 16, 16, 8), ("star", "green", 48, 16, 8), ("circle", "red", 16, 44, 12),
               ("square", "blue", 48, 48, 8)]  # fmt: skip
    scene = Scene(tuple(SceneObject(*values) for values in objects), 0)
    np.testing.assert_array_equal(SelfTest("bundled:shapes_self_test").picture, render(scene))


def test_the_bundled_stop_sign_is_our_own_drawing() -> None:
    drawn = SelfTest("bundled:coco_self_test").picture.astype(int)
    assert abs(drawn - stop_sign()).max() <= 1


class RedThings:
    """Takes what is red for a stop sign."""

    class_names = CLASS_NAMES
    image_size = None
    name = "red things"

    def __init__(self, color: str) -> None:
        self.color = color

    def cache_key(self) -> dict[str, Any]:
        return {"color": self.color}

    def to(self, device: object) -> "RedThings":
        return self

    def __call__(self, images: np.ndarray) -> list[Detections]:
        found = []
        for image in images.astype(int):
            y, x = np.nonzero(image[..., 0] > image[..., 1:].max(-1) + 99)
            box = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], np.float32)
            found.append(Detections(["stop sign"], np.ones(1, np.float32), box, lambda indices: [self.color]))
        return found


def test_who_finds_the_stop_sign_and_its_color_passes() -> None:
    GenEvalReward(RedThings("red"), self_test=SelfTest("bundled:coco_self_test")).prepare("cpu")
    with pytest.raises(ValueError, match=r"show 'a photo of a red stop sign', but expected red .* 1 orange; are"):
        GenEvalReward(RedThings("orange"), self_test=SelfTest("bundled:coco_self_test")).prepare("cpu")


class Blind(ShapesDetector):
    """Is as sure as nothing, as one with wrong weights is."""

    def __call__(self, images: np.ndarray) -> list[Detections]:
        return [Detections(f.classes, f.scores * np.float32(0.01), f.boxes, f.colors) for f in super().__call__(images)]


def test_nothing_is_judged_before_the_self_test_is_passed() -> None:
    image = ShapesStream()[0]
    good = GenEvalReward(ShapesDetector(), self_test=SelfTest("bundled:shapes_self_test"))
    assert good.verdicts([image.metadata], [image.image])[0].correct
    for use in (lambda reward: reward.prepare("cpu"), lambda reward: reward.detect([image.image])):
        blind = GenEvalReward(Blind(), self_test=SelfTest("bundled:shapes_self_test"))
        complaint = r"should show 'a photo of a circle', but expected circle>=1, found 0; are these the right"
        with pytest.raises(ValueError, match=complaint):
            use(blind)
    assert not GenEvalReward(Blind()).verdicts([image.metadata], [image.image])[0].correct  # skipped by name


def test_a_prompt_without_what_it_asks_for_is_refused() -> None:
    complaint = "GenEval cannot judge the prompt 'a photo of a star': it has no tag and no include"
    with pytest.raises(ValueError, match=complaint):
        GenEvalReward(ShapesDetector())([{"prompt": "a photo of a star"}], torch.zeros(1, 3, 64, 64))


def test_a_self_test_that_cannot_fail_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*picture.png"):
        SelfTest(str(tmp_path))
    folder = shutil.copytree(BUNDLED / "shapes_self_test", tmp_path / "copy")
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["correct"]))
    with pytest.raises(ValueError, match=r"needs prompts that the picture fulfils, and ones that it does not"):
        SelfTest(str(folder))
    (folder / "prompts.jsonl").write_text(json.dumps(TWO_STARS))
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: not a prompt with the key 'correct'"):
        SelfTest(str(folder))
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: include.0.: unknown class 'circle'"):
        SelfTest("bundled:shapes_self_test").check(lambda rows, images: [], ["dog"])


def stored(path: Path, *rows: Any) -> StoredDetections:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StoredDetections(str(path), ["star", "circle"])


def test_detections_made_elsewhere_are_looked_up_by_file(tmp_path: Path) -> None:
    star = {"class": "star", "score": 0.9, "bbox": [1, 1, 9, 9], "color": "red"}
    star["mask"] = {"size": [2, 3], "counts": [1, 2, 3]}
    rows = [
        {"filename": "x/00000/samples/0000.png", "detections": [star, star | {"score": 0.2}]},
        {"filename": "00000/samples/0001.png", "detections": []},
    ]
    reward = GenEvalReward(stored(tmp_path / "found.jsonl", *rows))
    prompt = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": "a red star"}
    files = ["00000/samples/0001.png", "00000/samples/0000.jpg"]
    verdicts = reward.verdicts([prompt] * 2, [], files)
    assert [verdict.correct for verdict in verdicts] == [False, True]
    masks = reward.detect([], files)[1].masks
    assert masks is not None and masks([0]).tolist() == [[[False, True, False], [True, False, False]]]
    with pytest.raises(ValueError, match=r"found.jsonl: has no detections of 00001/samples/0000.png"):
        reward.detect([], ["00001/samples/0000.png"])
    with pytest.raises(ValueError, match=r"can only judge files"):
        reward.verdicts([prompt], [np.zeros((2, 3, 3), np.uint8)])
    del star["color"]
    with pytest.raises(ValueError, match=r"found.jsonl:1: an object has no color"):
        GenEvalReward(stored(tmp_path / "found.jsonl", *rows)).verdicts([prompt], [], files[1:])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"class": "dog"}, ":2: unknown class 'dog'"),
        ({"bbox": [1, 1, 1, 9]}, ":2: a box must be"),
        ({"bbox": [1, 2, 3]}, ":2: not a row of detections"),
        ({"score": float("nan")}, ":2: a box must be"),
        ({"color": "teal"}, ":2: unknown color 'teal'"),
        ({"mask": "QkP1"}, ":2: masks must be uncompressed run lengths"),
        ({"mask": {"size": [2, 3], "counts": [1, 2]}}, ":2: the run lengths of a mask do not add up to the pixels"),
        ({"mask": {"size": [2, 3], "counts": ["6"]}}, ":2: the run lengths of a mask do not add up to the pixels"),
        ({"mask": {"counts": [6]}}, ":2: the run lengths of a mask do not add up to the pixels"),
        ({}, ":3: 00001/samples/0000.png occurs twice"),
    ],
)
def test_broken_detections_are_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    star = {"class": "star", "score": 0.9, "bbox": [1, 1, 9, 9], "color": "red"}
    first = {"filename": "00000/samples/0000.png", "detections": [star]}
    second = {"filename": "00001/samples/0000.png", "detections": [star | changes]}
    with pytest.raises(ValueError, match=f"found.jsonl{complaint}"):
        stored(tmp_path / "found.jsonl", first, second, second)
