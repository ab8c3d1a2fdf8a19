"""Grounding: which tokens show what which word of a prompt names."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lightning_modules.backbone.text import PublishedTokenizer, word_spans
from lightning_modules.rewards.geneval_rules import Detections
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
    words = word_spans(prompt)
    return grounding(row, objects(), NAMES, 0.3, words, max_words=6, grid=4, image_size=32).reshape(4, 4, 6)


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


def test_every_part_of_a_name_of_several_words_is_one_mention(tmp_path: Path) -> None:
    """Text tokens are parts of words, and COCO's names may be two words, or a colour."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["teddy bear", "orange"] * 3, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    prompt = "an orange orange below two teddy bears and a black bear"
    spans = PublishedTokenizer(str(tmp_path)).spans(prompt)
    boxes = np.array([[0, 0, 8, 8], [24, 24, 32, 32], [0, 24, 8, 32]], np.float32)
    colors = ["yellow", "black", "orange"]
    found = Detections(
        ["orange", "bear", "teddy bear"], np.ones(3, np.float32), boxes, lambda wanted: [colors[i] for i in wanted]
    )
    row = {"include": [{"class": "orange", "count": 1, "color": "orange"}], "prompt": prompt}
    seen = grounding(row, found, ("orange", "bear", "teddy bear"), 0.3, spans, 60, 4, 32).reshape(4, 4, 60)
    corners = {"orange": (0, 0), "bear": (3, 3), "teddy bear": (3, 0)}
    mentions = [(3, 9, "teddy bear"), (10, 16, "orange"), (27, 38, "teddy bear"), (45, 50, "bear"), (51, 55, "bear")]
    for place, (start, end) in enumerate(spans):
        wanted = [name for first, last, name in mentions if start < last and end > first]
        assert np.isnan(seen[..., place]).all() == (not wanted)
        if wanted:
            assert [tuple(place) for place in np.argwhere(seen[..., place] == 1)] == [corners[wanted[0]]]
    assert len(spans) > len(prompt.split()) and np.isnan(seen[..., len(spans) :]).all()
