"""Grounding: which tokens show what which word of a prompt names."""

import numpy as np

from lightning_modules.rewards.geneval import Detections
from lightning_modules.rewards.grounding import grounding

NAMES = ("star", "ring", "cross")


def objects() -> Detections:
    """A red star, a blue ring and, hardly seen, another ring, in an image of 32 pixels."""
    boxes = np.array([[0, 0, 16, 8], [16, 16, 24, 32], [24, 0, 32, 8]], np.float32)
    colors = ["red", "blue", "red"]
    return Detections(
        ["star", "ring", "ring"], np.array([0.9, 0.9, 0.1]), boxes, lambda found: [colors[i] for i in found]
    )


def ground(prompt: str, **clause: str) -> np.ndarray:
    row = {"include": [{"class": "star", "count": 1, **clause}], "prompt": prompt}
    return grounding(row, objects(), NAMES, threshold=0.3, max_words=6, grid=4, image_size=32).reshape(4, 4, 6)


def test_tokens_in_the_box_of_an_object_match_the_word_for_its_class() -> None:
    star, ring = ground("a star and two rings").transpose(2, 0, 1)[[1, 4]]
    assert star.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert ring.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]  # the faint one does not count
    assert ground("crosses")[..., 0].sum() == 0


def test_colours_match_where_the_prompt_names_any_and_a_shape_is_everything() -> None:
    blue = ground("a blue star", color="blue")
    assert blue[..., 1].tolist() == ground("a ring")[..., 1].tolist()
    assert ground("a shape")[..., 1].sum() == 4


def test_other_words_match_nothing_and_are_not_trained() -> None:
    missing = np.isnan(ground("a star and two rings")).all((0, 1))
    assert missing.tolist() == [True, False, True, True, False, True]
