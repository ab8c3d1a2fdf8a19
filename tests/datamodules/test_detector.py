"""The shapes detector against pictures whose truth is known, and against malformed ones."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from datamodules.prompt_templates import SPLITS
from datamodules.shapes.detector import REFERENCES, ShapesDetector
from datamodules.shapes.prompts import CLASSES
from datamodules.shapes.scenes import CaptionedImage, ShapesStream
from datamodules.shapes.world import PALETTE, Scene, SceneObject, render
from lightning_modules.rewards.geneval_metadata import COLORS, TASKS
from lightning_modules.rewards.geneval_rules import GenEvalRules

Images = NDArray[np.uint8]
PER_SPLIT = 100
DETECTOR = ShapesDetector()
RULES = GenEvalRules(class_names=DETECTOR.class_names)


@pytest.fixture(scope="module")
def pictures() -> list[CaptionedImage]:
    """The same number of every task, from every split."""
    even = dict.fromkeys(TASKS, 1.0)
    streams = [ShapesStream(split=split, seed=3, task_weights=even) for split in SPLITS]
    return [stream[i] for stream in streams for i in range(PER_SPLIT)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def stack(pictures: Sequence[CaptionedImage]) -> Images:
    return np.stack([picture.image for picture in pictures])


def scores_by_task(images: Images, pictures: Sequence[CaptionedImage]) -> dict[str, float]:
    """Share of images correct, by task."""
    correct = defaultdict(list)
    for picture, detections in zip(pictures, DETECTOR(images), strict=True):
        verdict = RULES.evaluate(picture.metadata, detections)
        correct[picture.metadata["tag"]].append(verdict.correct)
    return {task: float(np.mean(values)) for task, values in correct.items()}


def noisy(images: Images, rng: np.random.Generator) -> Images:
    return np.clip(images + rng.integers(-15, 16, images.shape), 0, 255).astype(np.uint8)


def blurred(images: Images, rng: np.random.Generator) -> Images:
    return np.rint(ndimage.gaussian_filter(images.astype(np.float32), (0, 0.9, 0.9, 0))).astype(np.uint8)


def recolored(images: Images, rng: np.random.Generator) -> Images:
    """All pixels of an image a little redder, darker, ...: up to 12 a channel."""
    return np.clip(images + rng.integers(-12, 13, (len(images), 1, 1, 3)), 0, 255).astype(np.uint8)


def one(name: str, color: str = "blue", x: int = 32, radius: int = 8) -> Images:
    return render(Scene((SceneObject(name, color, x, 32, radius),), 0))


@pytest.mark.parametrize("change", [None, noisy, blurred, recolored, lambda i, rng: noisy(blurred(i, rng), rng)])
def test_pictures_that_fulfil_their_prompt_are_correct(
    pictures: list[CaptionedImage],
    rng: np.random.Generator,
    change: Callable[[Images, np.random.Generator], Images] | None,
) -> None:
    images = stack(pictures)
    scores = scores_by_task(change(images, rng) if change else images, pictures)
    assert set(scores) == set(TASKS)
    assert min(scores.values()) >= 0.985


def test_other_prompts_are_not_fulfilled(pictures: list[CaptionedImage], rng: np.random.Generator) -> None:
    order = np.argsort(rng.random(len(pictures)))
    scores = scores_by_task(stack(pictures)[order], pictures)
    assert np.mean(list(scores.values())) < 0.1  # one of eight classes, or more, is shown by chance


def test_every_object_is_found_with_its_class_colour_and_box(pictures: list[CaptionedImage]) -> None:
    for picture, found in zip(pictures, DETECTOR(stack(pictures)), strict=True):
        colors = found.colors(range(len(found.classes)))
        centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
        assert len(centres) == len(picture.scene.objects)
        for item in picture.scene.objects:
            nearest = int(np.hypot(*(centres - [item.x, item.y]).T).argmin())
            assert (found.classes[nearest], colors[nearest]) == (item.name, item.color)
            assert found.scores[nearest] > 0.95
            # No shape fills the box of its radius entirely, the heart least.
            assert np.abs(found.boxes[nearest] - np.array(item.box)).max() <= 0.25 * item.radius


def test_box_ends_behind_the_last_pixel() -> None:
    image = np.full((1, 64, 64, 3), 170, np.uint8)
    image[0, 10:24, 30:44] = PALETTE["red"]
    (found,) = DETECTOR(image)
    assert (found.classes, found.boxes.tolist()) == (["square"], [[30, 10, 44, 24]])
    assert found.boxes.dtype == found.scores.dtype == np.float32


def test_one_shape_spliced_from_two_is_none(rng: np.random.Generator) -> None:
    """The left half of one class with the right half of another."""
    pairs = [(a, b) for a in CLASSES for b in CLASSES if a != b]
    images = np.stack([one(a, radius=r) for r in (8, 12) for a, _ in pairs])
    images[:, :, 32:] = np.stack([one(b, radius=r) for r in (8, 12) for _, b in pairs])[:, :, 32:]
    assert max(score for found in DETECTOR(images) for score in found.scores) < 0.3


def test_half_a_shape_and_a_shape_in_two_colours_are_none() -> None:
    halves = np.stack([one(name, radius=radius) for name in CLASSES for radius in (8, 12)])
    halves[:, :, 32:] = halves[:, :1, :1]
    two_colored = np.stack([one(name, radius=radius) for name in CLASSES for radius in (8, 12)])
    other = np.stack([one(name, "orange", radius=radius) for name in CLASSES for radius in (8, 12)])
    two_colored[:, :, 32:] = other[:, :, 32:]
    for found in DETECTOR(np.concatenate([halves, two_colored])):
        assert len(found.scores) and found.scores.max() < 0.3


def test_shapes_with_wrong_patches_are_none(pictures: list[CaptionedImage], rng: np.random.Generator) -> None:
    """One quarter of every object replaced by background: what a wrong token does."""
    images = stack(pictures)
    for image, picture in zip(images, pictures, strict=True):
        for item in picture.scene.objects:
            x, y = int(item.x), int(item.y)
            reach = item.radius + 1
            left, top = (int(at) - reach * int(rng.integers(2)) for at in (x, y))
            image[max(top, 0) : top + reach, max(left, 0) : left + reach] = image[0, 0]
    assert max(scores_by_task(images, pictures).values()) < 0.05


def test_fused_objects_of_one_colour_are_none_of_two_colours_are_two() -> None:
    for colors, expected in ((("red", "red"), set()), (("red", "white"), {"square", "circle"})):
        image = one("square", colors[0], x=24)
        right = one("circle", colors[1], x=39)
        image[:, 31:] = right[:, 31:]
        (found,) = DETECTOR(image[None])
        kept = {name for name, score in zip(found.classes, found.scores, strict=True) if score > 0.9}
        assert kept == expected
        assert (found.scores < 0.3).sum() == len(found.scores) - len(kept)


def test_a_shape_with_a_tail_is_none() -> None:
    image = one("circle", radius=12)
    image[31:34, 32:] = PALETTE["blue"]  # as far as the border, out of the window that is compared
    (found,) = DETECTOR(image[None])
    assert found.scores.tolist() == pytest.approx([0], abs=0.1)


def test_dirt_is_no_object() -> None:
    image = one("star", "purple")[None]
    (clean,) = DETECTOR(image)
    image[0, 5:9, 50:54] = PALETTE["red"]
    image[0, 32, 32] = PALETTE["green"]
    (dirty,) = DETECTOR(image)
    assert dirty.classes == clean.classes == ["star"]
    assert dirty.scores[0] > 0.9


def test_a_few_wrong_pixels_at_the_rim_do_no_harm() -> None:
    for name in CLASSES:
        image = one(name, "green")
        rows, columns = np.nonzero((image != image[0, 0]).any(-1))
        image[rows[:2], columns[:2]] = image[0, 0]  # its topmost pixels
        (found,) = DETECTOR(image[None])
        assert found.classes == [name] and found.scores[0] > 0.9


def test_no_objects_where_there_are_none(rng: np.random.Generator) -> None:
    nothing = np.full((1, 64, 64, 3), 170, np.uint8)
    assert [len(found.classes) for found in DETECTOR(nothing)] == [0]
    assert DETECTOR(nothing[:0]) == []
    garbage = [np.full((1, 64, 64, 3), color, np.uint8) for color in PALETTE.values()]
    garbage.append(rng.integers(0, 256, (32, 64, 64, 3)).astype(np.uint8))
    assert all((found.scores < 0.3).all() for found in DETECTOR(np.concatenate(garbage)))


def test_batches_change_nothing(pictures: list[CaptionedImage]) -> None:
    images = stack(pictures[:40])
    for a, b in zip(DETECTOR(images), ShapesDetector(batch_size=7)(images), strict=True):
        assert a.classes == b.classes
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)


def test_names_are_the_worlds_and_genevals() -> None:
    assert DETECTOR.class_names == CLASSES
    assert tuple(REFERENCES) == COLORS


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 64, 64), (1, 64, 64, 4), (1, 32, 32, 3)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs uint8 images \[B, 64, 64, 3\], not uint8 \["):
        DETECTOR(np.zeros(shape, np.uint8))


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="not float32"):
        DETECTOR(np.zeros((1, 64, 64, 3), np.float32))
