"""Scoring a folder of images: known images, interruptions, faults."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from PIL import ExifTags, Image, ImageOps

from datamodules.geneval_prompts import sample_path
from datamodules.shapes.detector import ShapesDetector
from datamodules.shapes.prompts import shapes_prompts
from datamodules.shapes.scenes import ShapesStream, scene_for
from datamodules.shapes.world import render
from lightning_modules.report.results import result_line
from lightning_modules.rewards.fid import FID, CLIPFeatures
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.geneval_rules import Detections
from lightning_modules.rewards.verifier import Reward
from lightning_modules.tasks.scoring import Scoring
from tests.helpers.evaluators import make_evaluator
from tests.helpers.pictures import write_folder

PER_TASK, SAMPLES = 5, 2


@pytest.fixture(scope="module")
def truth() -> tuple[list[dict[str, Any]], dict[tuple[int, int], np.ndarray]]:
    """Prompts of all tasks, with drawings of what they ask."""
    rows = shapes_prompts("evaluation", PER_TASK)
    rng = np.random.default_rng(0)
    images = {(i, j): render(scene_for(row, rng)) for i, row in enumerate(rows) for j in range(SAMPLES)}
    return rows, images


@pytest.fixture
def images(tmp_path: Path, truth: tuple[Any, Any]) -> Path:
    return write_folder(tmp_path / "images", *truth)


class Brightness(Reward):
    def cache_key(self) -> str:
        return type(self).__name__

    def __call__(self, prompts: Any, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((1, 2, 3))


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Score a folder; gives geneval.json and the rows of results.jsonl."""

    def score_(images: Path, detector: Any = None, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        settings: dict[str, Any] = {"rewards": {}, "fid": None, "batch_size": 4, "results": str(tmp_path / "scores")}
        settings |= changes
        rewards, fid = settings.pop("rewards"), settings.pop("fid")
        geneval = GenEvalReward(detector or ShapesDetector())
        evaluator = make_evaluator(geneval, rewards, independent_judges=list(rewards), fid=fid)
        scoring = Scoring(str(images), evaluator, folder=str(tmp_path / "out"), num_workers=0, **settings)
        scoring.run(Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False))
        assert Image.open(tmp_path / "out" / "sheet.png").size[0] > 300
        lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
        return json.loads((tmp_path / "out" / "geneval.json").read_text()), [json.loads(line) for line in lines]

    return score_


def test_drawings_are_right_and_drawings_of_other_prompts_are_not(tmp_path: Path, images: Path, truth, score) -> None:
    report, rows = score(images)
    assert report["overall"] >= 0.99
    assert [row["filename"] for row in rows] == [
        f"{images}/{sample_path(i, j)}" for i in range(6 * PER_TASK) for j in range(SAMPLES)
    ]
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert [json.loads(row["metadata"]) for row in rows[::SAMPLES]] == truth[0]
    assert report["total_images"] == len(rows) == 60 and not report["left_out"] and not report["warnings"]
    places = list(truth[1])
    random.Random(0).shuffle(places)
    shuffled = dict(zip(places, truth[1].values(), strict=True))
    chance, _ = score(write_folder(tmp_path / "shuffled", truth[0], shuffled))
    assert chance["overall"] <= 0.15


def test_rows_are_the_official_ones_byte_for_byte() -> None:
    row = {"filename": "a/0.png", "tag": "colors", "prompt": "an \u00e9toile", "correct": True, "reason": "x\ny",
           "metadata": '{"a": 1}', "details": "{}"}  # fmt: skip
    assert result_line(row) == (
        r'{"filename":"a\/0.png","tag":"colors","prompt":"an \u00e9toile","correct":true,"reason":"x\ny",'
        r'"metadata":"{\"a\": 1}","details":"{}"}'
    )


class Counted(ShapesDetector):
    """Counts the images it has looked at, and fails after some."""

    seen = 0
    limit = 10**9

    def __call__(self, images: np.ndarray) -> list[Detections]:
        if Counted.seen + len(images) > Counted.limit:
            raise KeyboardInterrupt
        Counted.seen += len(images)
        return super().__call__(images)

    def cache_key(self) -> dict[str, Any]:
        return ShapesDetector().cache_key()  # it finds the same


class Company(Reward):
    """Says how many images it was shown together."""

    def cache_key(self) -> str:
        return type(self).__name__

    def __call__(self, prompts: Any, pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels),), float(len(pixels)))


def test_what_was_judged_is_not_judged_again(images: Path, score, monkeypatch: pytest.MonkeyPatch) -> None:
    company = {"company": Company()}
    whole = score(images, Counted(), rewards=company, results=str(images.parent / "others"), batch_size=8)
    assert {row["company"] for row in whole[1]} == {16, 12}
    monkeypatch.setattr(Counted, "seen", 0)
    monkeypatch.setattr(Counted, "limit", 30)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        score(images, Counted(), rewards=company, batch_size=8)
    assert Counted.seen == 16
    next(iter((images.parent / "scores").glob("*/00002-*.json"))).unlink()  # killed before its batch was all written
    monkeypatch.setattr(Counted, "limit", 10**9)
    assert score(images, Counted(), rewards=company, batch_size=8) == whole and Counted.seen == 16 + 60
    assert score(images, Counted(), rewards=company, batch_size=8) == whole and Counted.seen == 16 + 60
    shutil.copy(images / sample_path(1, 0), images / sample_path(0, 0))  # another image: its batch is judged anew
    assert score(images, Counted(), rewards=company, batch_size=8) != whole and Counted.seen == 16 + 60 + 16
    shutil.move(images, images.parent / "moved")  # what is judged are pictures, wherever they lie
    score(images.parent / "moved", Counted(), rewards=company, batch_size=8)
    assert Counted.seen == 16 + 60 + 16
    for stored in (images.parent / "scores").glob("*/00000-*.json"):
        stored.write_text("")  # a broken result is made again
    score(images.parent / "moved", Counted(), rewards=company, batch_size=8)
    assert Counted.seen == 16 + 60 + 16 + 16


def test_other_pixels_of_one_size_and_time_are_judged_anew(images: Path, score) -> None:
    """As archives unpack them, all with one time of change."""

    def write(pixels: list[np.ndarray]) -> None:
        for path, image in zip(sorted(images.rglob("*.png")), pixels, strict=True):
            Image.fromarray(image).save(path, compress_level=0)
            os.utime(path, (10**9, 10**9))

    pictures = [np.asarray(Image.open(path)) for path in sorted(images.rglob("*.png"))]
    write(pictures)
    first = score(images)[0]["overall"]
    write([np.full_like(image, 90) for image in pictures])
    assert first > 0 == score(images)[0]["overall"]


@pytest.mark.parametrize("text", ["not json", "[1]", '{"prompt_count": "many"}'])
def test_files_that_are_called_as_ours_are_no_obstacle(images: Path, score, text: str) -> None:
    (images / "provenance.json").write_text(text)
    assert score(images)[0]["total_images"] == 60


def test_further_judges_are_columns(images: Path, score, capsys: pytest.CaptureFixture[str]) -> None:
    report, rows = score(images, rewards={"brightness": Brightness()})
    expected = np.asarray(Image.open(images / sample_path(3, 1))).mean() / 255
    assert rows[3 * SAMPLES + 1]["brightness"] == pytest.approx(expected, abs=1e-5)
    assert report["independent"]["brightness"] == pytest.approx(np.mean([row["brightness"] for row in rows]))
    assert "brightness" in capsys.readouterr().out


def test_unusual_images_are_judged_and_named(images: Path, score) -> None:
    picture = Image.open(images / sample_path(0, 0))
    picture.save(images / sample_path(0, 0).replace("png", "jpg"), quality=100)
    (images / sample_path(0, 0)).unlink()
    Image.open(images / sample_path(1, 0)).convert("RGBA").save(images / sample_path(1, 0))
    Image.open(images / sample_path(2, 0)).convert("L").save(images / sample_path(2, 0))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.open(images / sample_path(3, 0)).transpose(Image.Transpose.ROTATE_90).save(
        images / sample_path(3, 0), exif=turned
    )
    turned[ExifTags.Base.Orientation] = 77
    for j, note in enumerate((Image.Exif(), turned)):  # absent, and none that there is
        Image.open(images / sample_path(4, j)).save(images / sample_path(4, j), exif=note)
    corner = Image.open(images / sample_path(5, 0)).getpixel((0, 0))
    Image.open(images / sample_path(5, 0)).save(images / sample_path(5, 0), transparency=corner)
    report, rows = score(images)
    assert report["total_images"] == len(rows) == 60
    assert report["warnings"] == [
        "00000/samples/0000.jpg is a JPEG image; lossy compression changes what is detected",
        "00001/samples/0000.png has the mode RGBA and was converted to RGB",
        "00002/samples/0000.png has the mode L and was converted to RGB",
        "00003/samples/0000.png was turned upright, as its EXIF data say",
        "00005/samples/0000.png is transparent in parts, which were laid on white",
    ]
    assert rows[0]["correct"] and rows[SAMPLES]["correct"] and rows[3 * SAMPLES]["correct"]


def test_images_that_cannot_be_judged_are_left_out_and_named(images: Path, score) -> None:
    whole = (images / sample_path(0, 0)).read_bytes()
    (images / sample_path(0, 0)).write_bytes(whole[: len(whole) // 2])
    (images / sample_path(1, 1)).write_bytes(b"no image")
    Image.new("RGB", (32, 64)).save(images / sample_path(2, 0))
    Image.new("I;16", (64, 64)).save(images / sample_path(3, 0))
    Image.open(images / sample_path(4, 0)).save(images / f"{sample_path(4, 0)}.tmp", format="PNG")
    shutil.copytree(images / "00005", images / "00005_old")
    report, rows = score(images)
    assert report["total_images"] == len(rows) == 56
    folder, first, second, third, deep, other = report["left_out"]
    assert folder == "00005_old has no name like 00000"
    assert first.startswith("00000/samples/0000.png cannot be read: ")
    assert second.startswith("00001/samples/0001.png cannot be read: ")
    assert third == "00002/samples/0000.png has 32x64 pixels, and the detector needs 64x64"
    assert deep == "00003/samples/0000.png has the mode I;16, more than 8 bits a pixel and colour"
    assert other == "00004/samples/0000.png.tmp has no name like 0000.png"
    assert report["warnings"] == [f"0000{i} has 1 images instead of 2" for i in range(4)]


def test_missing_and_repeated_prompts_are_said(images: Path, score) -> None:
    shutil.rmtree(images / "00004")
    shutil.copytree(images / "00003", images / "00100")
    (images / sample_path(7, 1)).unlink()
    report, _ = score(images)
    prompt = json.loads((images / "00003" / "metadata.jsonl").read_text())["prompt"]
    assert report["warnings"] == [
        f"prompts that occur more than once: 1, such as {prompt!r} 2 times",
        "from 00000 to 00100 the folders of 71 numbers are missing, 00004 first",
        "00007 has 1 images instead of 2",
    ]


def test_tasks_that_the_overall_score_leaves_out_are_said(images: Path, score) -> None:
    for i in range(4 * PER_TASK, 6 * PER_TASK):
        shutil.rmtree(images / f"{i:05d}")
    report, _ = score(images)
    assert report["overall"] == 1 and len(report["tasks"]) == 4
    assert report["warnings"] == ["no image of position, color_attr was judged: the overall score leaves that out"]


def star(**changes: Any) -> str:
    include = [{"class": "star", "count": 1, **changes}]
    return json.dumps({"tag": "single_object", "include": include, "prompt": "a photo of a star"})


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (None, r"00005/metadata.jsonl: there is no such file"),
        (star() + "\n" + star() + "\n", r"00005/metadata.jsonl: must hold one prompt in one line, not 2"),
        ("{", r"00005/metadata.jsonl:1: not valid JSON"),
        (star(**{"class": "dog"}), r"00005/metadata.jsonl: include\[0\]: unknown class 'dog', known are circle, "),
    ],
)
def test_folders_of_unknown_prompts_are_refused(images: Path, score, metadata: str | None, complaint: str) -> None:
    about = images / "00005" / "metadata.jsonl"
    about.unlink() if metadata is None else about.write_text(metadata)
    with pytest.raises(ValueError, match=complaint):
        score(images)


def test_folders_without_images_are_refused(images: Path, score) -> None:
    shutil.copy(images / sample_path(6, 0), images / sample_path(6, 0).replace("png", "jpg"))
    with pytest.raises(ValueError, match=r"00006/samples: 0000.jpg and 0000.png have one number, and only one of them"):
        score(images)
    shutil.rmtree(images / "00005" / "samples")
    with pytest.raises(ValueError, match=r"00005/samples: there are no images .*; .*00006/samples: 0000.jpg and"):
        score(images)
    for i in range(10, 16):
        (images / f"{i:05d}" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"00012/metadata.jsonl: there is no such file.*; 3 more folders have faults$"):
        score(images)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        score(images / "nowhere")
    with pytest.raises(ValueError, match=r"has no folders 00000, 00001"):
        score(images / "00001")


def test_the_distance_to_references_is_reported(tmp_path: Path, images: Path, score, compose_config) -> None:
    def distance(folder: Path) -> float:
        clip = instantiate(compose_config().clip, _convert_="all")
        fid = FID(ShapesStream(split="train", seed=9), 64, CLIPFeatures(clip))
        return score(folder, fid=fid)[0]["independent"]["fid"]

    inverted = shutil.copytree(images, tmp_path / "inverted")
    for path in inverted.rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    assert distance(inverted) > 5 * distance(images) > 0
