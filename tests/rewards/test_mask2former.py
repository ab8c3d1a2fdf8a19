"""Mask2Former's objects on tiny random weights: every step against a slow, literal version."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation

from lightning_modules.rewards.geneval_metadata import CLASS_NAMES
from lightning_modules.rewards.mask2former import Mask2FormerDetector, _measure
from lightning_modules.rewards.tiny_geneval import save_tiny_mask2former


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_mask2former(str(tmp_path_factory.mktemp("mask2former") / "tiny"))


@pytest.fixture(scope="module")
def detector(checkpoint: str) -> Mask2FormerDetector:
    return Mask2FormerDetector(checkpoint, batch_size=2, shortest=64, longest=96, max_objects=30)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Three of 50 x 70 pixels: blurred noise, so that masks are not specks."""
    rough = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(rough, (50, 70), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def literal(detector: Mask2FormerDetector, image: np.ndarray) -> list[tuple[str, float, list[float], np.ndarray]]:
    """Objects of one image, pair by pair: 50 x 70 becomes 64 x 90, padded to 64 x 96."""
    resized = F.interpolate(torch.tensor(image).permute(2, 0, 1)[None].float(), (64, 90), mode="bilinear").round()
    padded = torch.full((1, 3, 64, 96), 128.0)
    padded[..., :90] = resized
    for channel, (mean, std) in enumerate(zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), strict=True)):
        padded[:, channel] = (padded[:, channel] - mean) / std
    output = detector.model(pixel_values=padded)
    probs = output.class_queries_logits[0].softmax(-1)
    pairs = sorted(((float(probs[q, c]), q, c) for q in range(12) for c in range(80)), reverse=True)
    objects = []
    for prob, q, c in pairs[:30]:
        mask = F.interpolate(output.masks_queries_logits[:, q : q + 1], (64, 96), mode="bilinear")[..., :90]
        mask = F.interpolate(mask, (50, 70), mode="bilinear")[0, 0].numpy()
        inside = mask > 0
        sure = (1 / (1 + np.exp(-mask[inside]))).sum() / (inside.sum() + 1e-6)
        ys, xs = inside.nonzero()
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0] * 4
        objects.append((CLASS_NAMES[c], prob * sure, [float(x) for x in box], inside))
    return objects


def test_objects_are_those_of_the_literal_way(detector: Mask2FormerDetector, images: np.ndarray) -> None:
    boxes = set()
    for image, found in zip(images, detector(images), strict=True):
        expected = literal(detector, image)
        assert list(found.classes) == [name for name, *_ in expected]
        np.testing.assert_allclose(found.scores, [score for _, score, *_ in expected], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found.boxes, [box for _, _, box, _ in expected])
        assert found.masks is not None and found.scores.dtype == found.boxes.dtype == np.float32
        np.testing.assert_array_equal(found.masks([3, 0]), [expected[3][3], expected[0][3]])
        boxes |= {tuple(box) for _, _, box, _ in expected}
    assert len(boxes) > 5, "the masks are too much alike to tell anything"


def test_square_images_are_not_padded(detector: Mask2FormerDetector) -> None:
    inputs, inner = detector._inputs(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))
    assert inputs.shape == (1, 3, 64, 64) and inner == (64, 64)
    wide, inner = detector._inputs(torch.zeros(1, 40, 100, 3, dtype=torch.uint8))
    assert wide.shape == (1, 3, 64, 96) and inner == (38, 96)  # the longer side may not exceed 96


def test_empty_masks_have_no_box_and_no_score() -> None:
    logits = torch.full((2, 4, 6), -1.0)
    logits[1, 2, 1:4] = 3
    sure, boxes = _measure(logits)
    assert sure[0] == 0 and sure[1] == pytest.approx(float(torch.tensor(3.0).sigmoid()), abs=1e-5)
    assert boxes.tolist() == [[0, 0, 0, 0], [1, 2, 4, 3]]


def test_bfloat16_finds_much_the_same(checkpoint: str, detector: Mask2FormerDetector, images: np.ndarray) -> None:
    rough = Mask2FormerDetector(checkpoint, dtype="bfloat16", shortest=64, longest=96, max_objects=30)
    assert rough.model.dtype == torch.bfloat16
    for one, other in zip(rough(images), detector(images), strict=True):
        assert one.scores.dtype == np.float32
        assert abs(one.scores[0] - other.scores[0]) < 0.1


def test_weights_that_cannot_be_had_are_named_with_all_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        Mask2FormerDetector()
    assert str(error.value) == (
        "'facebook/mask2former-swin-small-coco-instance' is neither a folder nor to be had from the Hugging Face hub "
        "(OSError); where there is network run `hf download facebook/mask2former-swin-small-coco-instance --local-dir "
        "FOLDER`, then set geneval.reward.detector.checkpoint=FOLDER, and for colors run `hf download "
        "timm/vit_large_patch14_clip_224.openai --include 'open_clip_*' --local-dir CLIP`, then set "
        "geneval.reward.colors.pretrained to the file of weights in CLIP"
    )


def test_other_models_are_refused(tmp_path: Path, checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"knows 133 classes instead of the 80 of COCO's instances"):
        Mask2FormerDetector(save_tiny_mask2former(str(tmp_path / "panoptic"), labels=133))
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        Mask2FormerDetector(str(tmp_path))
    model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint)
    state = {key: value for key, value in model.state_dict().items() if "class_predictor" not in key}
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(ValueError, match=r"has no tensor 'class_predictor.bias' of the right shape"):
        Mask2FormerDetector(str(tmp_path / "headless"))
