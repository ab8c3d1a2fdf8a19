"""Preferences from files: images and tokens, and what is refused with file and row."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from datamodules.preference_files import PreferenceFile
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.backbone.next_token import NextTokenDecoder

COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
PROMPT = "a photo of a star"
ONES, TWOS = [1] * 16, [2] * 16


def write(folder: Path, *rows: Any) -> PreferenceFile:
    """A JSONL file of these rows; a string is written as it is."""
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return PreferenceFile(str(path), "train", COLUMNS)


@pytest.fixture
def images(tmp_path: Path) -> list[np.ndarray]:
    """Two rendered images, also saved as 0.png and 1.png, the second twice as large."""
    stream = ShapesStream(split="train", seed=0)
    pixels = [stream[0].image, stream[1].image]
    Image.fromarray(pixels[0]).save(tmp_path / "0.png")
    Image.fromarray(pixels[1]).resize((128, 128)).save(tmp_path / "1.png")
    return pixels


def test_tokens_come_back_as_they_are(decoder: NextTokenDecoder, tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "chosen": ONES, "rejected": TWOS}
    rows = write(tmp_path, row, row | {"weight": 0.5}).encode(decoder, 4)
    assert rows[:] == {"prompt": [PROMPT] * 2, "chosen": [ONES] * 2, "rejected": [TWOS] * 2, "weight": [1.0, 0.5]}


@pytest.mark.parametrize("batch_size", [1, 64])
def test_images_are_encoded_in_order_at_any_batch_size(
    decoder: NextTokenDecoder, tmp_path: Path, images: list[np.ndarray], batch_size: int
) -> None:
    source = write(
        tmp_path,
        {"prompt": PROMPT, "chosen": "0.png", "rejected": ONES},
        {"prompt": PROMPT, "chosen": TWOS, "rejected": "0.png"},
        {"prompt": PROMPT, "chosen": "1.png", "rejected": "0.png"},
    )
    rows = source.encode(decoder, batch_size)
    assert rows["rejected"][0] == ONES and rows["chosen"][1] == TWOS
    assert rows["chosen"][0] == rows["rejected"][1] == rows["rejected"][2] != rows["chosen"][2]


def test_image_columns_of_datasets_are_read(
    decoder: NextTokenDecoder, tmp_path: Path, images: list[np.ndarray]
) -> None:
    features = datasets.Features(
        {"caption": datasets.Value("string"), "jpg_0": datasets.Image(), "jpg_1": datasets.Image()}
    )
    made = {"caption": [PROMPT], "jpg_0": [Image.fromarray(images[0])], "jpg_1": [Image.fromarray(images[1])]}
    datasets.Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "hub"))
    columns = {"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1"}
    rows = PreferenceFile(str(tmp_path / "hub"), "train", columns).encode(decoder, 8)
    jsonl = write(tmp_path, {"prompt": PROMPT, "chosen": "0.png", "rejected": ONES}).encode(decoder, 8)
    assert rows["chosen"][0] == jsonl["chosen"][0]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": PROMPT, "chosen": ONES}, r"there is no 'rejected'; the row has: prompt, chosen"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": [*ONES[:15], 32]}, r"token 32 is not in 0\.\.31"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": [*ONES[:15], -1]}, r"token -1 is not in 0\.\.31"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": ONES[:15]}, r"15 tokens, where an image has 16"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": "missing.png"}, r"cannot read the image missing\.png"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": "broken.png"}, r"cannot read the image broken\.png"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": ONES}, r"chosen and rejected are the same image"),
        ({"prompt": "a photo of a dog", "chosen": ONES, "rejected": TWOS}, r"dog"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": TWOS, "decoder": "other"}, r"made for another decoder"),
        (
            {"prompt": PROMPT, "chosen": ONES, "rejected": TWOS, "weight": -1},
            r"weight -1 is not a number",
        ),
        ('{"prompt": ', r"not valid JSON"),
        ([1, 2], r"not an object but \[1, 2\]"),
        ({"prompt": 7, "chosen": ONES, "rejected": TWOS}, r"'7'"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(
    decoder: NextTokenDecoder, tmp_path: Path, row: Any, sentence: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = write(tmp_path, {"prompt": PROMPT, "chosen": ONES, "rejected": TWOS}, row)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: .*" + sentence):
        source.encode(decoder, 8)


def test_an_empty_or_missing_file_is_refused(decoder: NextTokenDecoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs\.jsonl has no rows"):
        write(tmp_path).encode(decoder, 8)
    with pytest.raises(FileNotFoundError, match=r"there is no preference file .*nowhere\.jsonl"):
        PreferenceFile("nowhere.jsonl", "train", COLUMNS).digest()


def test_a_broken_image_in_a_data_set_is_named_by_row(decoder: NextTokenDecoder, tmp_path: Path) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    good = {"bytes": None, "path": str(tmp_path / "0.png")}
    Image.fromarray(ShapesStream(split="train", seed=0)[0].image).save(tmp_path / "0.png")
    made = {"prompt": [PROMPT], "chosen": [good], "rejected": [{"bytes": b"nonsense", "path": None}]}
    datasets.Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"set, row 0: cannot read the image"):
        PreferenceFile(str(tmp_path / "set"), "train", COLUMNS).encode(decoder, 8)
