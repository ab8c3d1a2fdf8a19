"""Crops against those of the official script; the classifier on a tiny CLIP with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.rewards.color import CLIPColors, crop
from lightning_modules.rewards.geneval_metadata import COLORS
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.geneval_rules import Detections
from lightning_modules.rewards.tiny_geneval import save_tiny_clip

GOLDEN = Path(__file__).parents[1] / "golden" / "geneval"
CASES = json.loads((GOLDEN / "crops.json").read_text())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> CLIPColors:
    return CLIPColors(save_tiny_clip(str(tmp_path_factory.mktemp("clip") / "clip")), pretrained=None, batch_size=7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['note']}")
def test_crops_are_those_of_the_official_script(case: dict[str, Any]) -> None:
    with np.load(GOLDEN / "crops.npz") as arrays:
        image, mask, expected = (arrays[f"{name}_{case['id']:02d}"] for name in ("image", "mask", "crop"))
    background = case["options"].get("bgcolor", "#999")
    settings = (None if background == "original" else background, case["options"].get("crop", "1") == "1")
    box = np.array(case["box"], np.float32)
    made = crop(image, box, mask if case["use_mask"] else None, *settings)
    np.testing.assert_array_equal(np.asarray(made), expected)


def test_a_color_is_the_one_whose_sentences_fit_best(classifier: CLIPColors) -> None:
    rng = np.random.default_rng(0)
    crops = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((5, 9), (40, 32), (33, 90)) * 4]
    names = ["dog", "cup", "dog", "bed"] * 3
    found = classifier(crops, names)
    clip, tokenizer = classifier.clip, classifier.tokenizer
    for picture, name, color in zip(crops, names, found, strict=True):
        image = clip.encode_image(classifier.transform(picture)[None])[0]
        scores = []
        for other in COLORS:
            sentences = [f"a photo of a {other} {name}", f"a photo of a {other}-colored {name}",
                         f"a photo of a {other} object"]  # fmt: skip
            text = torch.stack([row / row.norm() for row in clip.encode_text(tokenizer(sentences))]).mean(0)
            scores.append(float(image / image.norm() @ (text / text.norm())))
        assert color == COLORS[int(np.argmax(scores))]
    assert len(set(found)) > 1


class Boxes:
    """Finds the same two dogs in every image."""

    class_names = ("dog", "cat")
    image_size = None
    name = "boxes"

    def cache_key(self) -> dict[str, Any]:
        return {}

    def to(self, device: object) -> "Boxes":
        return self

    def __call__(self, images: np.ndarray) -> list[Detections]:
        boxes = np.array([[2, 2, 20, 30], [25, 5, 40, 40], [1, 1, 9, 9]], np.float32)
        scores = np.array([0.9, 0.8, 0.1], np.float32)
        return [Detections(["dog", "dog", "cat"], scores, boxes, None) for _ in images]


def test_there_are_no_colors_without_weights(tmp_path: Path) -> None:
    sentence = r"^geneval.reward.colors: .*; where there is network run `hf download timm/vit_large.*\.pretrained"
    with pytest.raises(FileNotFoundError, match=sentence):
        CLIPColors(pretrained=str(tmp_path / "nowhere.safetensors"))
    name = save_tiny_clip(f"{tmp_path}/clip")
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=sentence):  # open_clip's own is a random network, and a warning
        CLIPColors(name, pretrained=None)


def test_the_crops_of_a_batch_are_named_in_one_pass(classifier: CLIPColors, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[str]] = []
    monkeypatch.setattr(CLIPColors, "__call__", lambda self, crops, names: passes.append(names) or ["red"] * len(names))
    reward = GenEvalReward(Boxes(), classifier)
    images = list(np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8))
    asked = [
        {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}]},
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "blue"}]},
        {"tag": "colors", "include": [{"class": "dog", "count": 3, "color": "red"}]},  # too few: no colour is asked
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}]},
    ]
    verdicts = reward.verdicts(asked, images)
    assert passes == [["dog"] * 3]
    assert [verdict.correct for verdict in verdicts] == [True, False, False, True]
    assert verdicts[1].reason == "expected blue dog>=1, found 0 blue; and 1 red"
