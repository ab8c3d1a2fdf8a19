"""Preferences from files: images and tokens, and what is refused with file and row."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from datamodules.preference_files import PreferenceFile, PreferenceFilesDataModule
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.backbone.compact import CompactDecoder

COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
PROMPT = "a photo of a star"
ONES, TWOS = [1] * 16, [2] * 16
PAIR = {"prompt": PROMPT, "chosen": ONES, "rejected": TWOS}


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


def test_tokens_come_back_as_they_are(decoder: CompactDecoder, tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "chosen": ONES, "rejected": TWOS}
    rows = write(tmp_path, row, row | {"weight": 0.5}).encode(decoder, 4)
    assert rows[:] == {"prompt": [PROMPT] * 2, "chosen": [ONES] * 2, "rejected": [TWOS] * 2, "weight": [1.0, 0.5]}


@pytest.mark.parametrize("batch_size", [1, 64])
def test_images_are_encoded_in_order_at_any_batch_size(
    decoder: CompactDecoder, tmp_path: Path, images: list[np.ndarray], batch_size: int
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


def test_images_are_encoded_as_they_are_seen(decoder: CompactDecoder, tmp_path: Path, images: list[np.ndarray]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lying = Image.fromarray(images[0]).transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "phone.png", exif=exif)
    rows = [{"prompt": PROMPT, "chosen": name, "rejected": TWOS} for name in ("0.png", "phone.png")]
    made = write(tmp_path, *rows).encode(decoder, 8)
    assert made["chosen"][0] == made["chosen"][1]


LABELLED = {"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1", "label": "label_0"}
HUB = datasets.Features(
    {"caption": datasets.Value("string"), "jpg_0": datasets.Value("binary"), "jpg_1": datasets.Image(),
     "label_0": datasets.Value("float64"), "split": datasets.Value("string")}
)  # fmt: skip


def hub(folder: Path, labels: list[float | None]) -> str:
    """A folder as of a data set with several splits; 0.png as encoded bytes, 1.png as an image of `datasets`."""
    jpg = [(folder / name).read_bytes() for name in ("0.png", "1.png")]
    row = {"caption": PROMPT, "jpg_0": jpg[0], "jpg_1": {"bytes": jpg[1], "path": None}, "split": "x"}
    made = datasets.Dataset.from_list([row | {"label_0": label} for label in labels], features=HUB)
    datasets.DatasetDict({"train": made.with_format("numpy"), "test": made.select(range(1))}).save_to_disk(
        str(folder / "hub")
    )
    return str(folder / "hub")


def test_a_label_says_which_image_of_a_data_set_is_chosen(
    decoder: CompactDecoder, tmp_path: Path, images: list[np.ndarray], capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    by_path = {"prompt": PROMPT, "chosen": "0.png", "rejected": "1.png"}
    (zero,), (one,) = (write(tmp_path, by_path).encode(decoder, 8)[side] for side in ("chosen", "rejected"))
    path = hub(tmp_path, [1.0, 0.0, 0.5, 0.0, 0.5])
    with caplog.at_level("INFO"):
        rows = PreferenceFile(path, "train", LABELLED).encode(decoder, 2)
    assert rows["chosen"][:] == [zero, one, one] and rows["rejected"][:] == [one, zero, zero]
    assert caplog.messages == [f"{path}: 2 ties are left out, which leaves 3 pairs"]
    unlabelled = {name: column for name, column in LABELLED.items() if name != "label"} | {"label": None}
    assert PreferenceFile(path, "train", unlabelled).encode(decoder, 2)["chosen"][:] == [zero] * 5
    assert len(PreferenceFile(path, "test", LABELLED).encode(decoder, 2)) == 1
    with pytest.raises(ValueError, match=r"hub has no split 'dev'; there are: train, test$"):
        PreferenceFile(path, "dev", LABELLED).check(decoder)
    with pytest.raises(ValueError, match=r"hub: there is no 'label_2'; the columns are: caption, jpg_0"):
        PreferenceFile(path, "train", LABELLED | {"label": "label_2"}).check(decoder)
    for label, shown in ((0.7, "0.7"), (float("nan"), "nan")):
        with pytest.raises(ValueError, match=rf"hub, row 1: the label {shown} is not 1, 0 or .5"):
            PreferenceFile(hub(tmp_path, [1.0, label]), "train", LABELLED).check(decoder)
    with pytest.raises(ValueError, match=r"hub, row 1: 'label_0' is null"):
        PreferenceFile(hub(tmp_path, [1.0, None]), "train", LABELLED).check(decoder)
    with pytest.raises(ValueError, match=r"hub has no rows but 2 ties$"):
        PreferenceFile(hub(tmp_path, [0.5, 0.5]), "train", LABELLED).encode(decoder, 2)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": PROMPT, "chosen": ONES}, r"there is no 'rejected'; the row has: prompt, chosen"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": [*ONES[:15], 32]}, r"token 32 is not in 0\.\.31"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": [*ONES[:15], -1]}, r"token -1 is not in 0\.\.31"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": ONES[:15]}, r"15 tokens, where an image has 16"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": "missing.png"}, r"missing\.png cannot be read: No such file"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": "broken.png"}, r"broken\.png cannot be read: it is no image"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": ONES}, r"chosen and rejected are the same image"),
        ({"prompt": "a photo of a dog", "chosen": ONES, "rejected": TWOS}, r"dog"),
        ({"prompt": PROMPT, "chosen": ONES, "rejected": TWOS, "decoder": "other"}, r"made for another decoder"),
        (
            {"prompt": PROMPT, "chosen": ONES, "rejected": TWOS, "weight": -1},
            r"weight -1 is not a number",
        ),
        (PAIR | {"weight": 1e40}, r"the weight 1e\+40 is not a number from 0 to 1,000,000"),
        (PAIR | {"weight": 10**400}, r"is not a number from 0 to 1,000,000"),
        ('{"prompt": ', r"not valid JSON"),
        ([1, 2], r"not an object but \[1, 2\]"),
        *(
            (PAIR | {"prompt": prompt}, rf"the prompt is not a text but {shown}")
            for prompt, shown in (
                (7, "7"),
                ([], r"\[\]"),
                ([{"role": "user", "content": PROMPT}], r"\[{'content': "),
                ({"text": PROMPT}, r"{'text': "),
                (True, "True"),
            )
        ),
        (PAIR | {"prompt": None}, r"'prompt' is null"),
        (PAIR | {"prompt": ""}, r"the prompt is empty"),
        (PAIR | {"prompt": " \u3000\n"}, r"the prompt is empty"),
        (PAIR | {"prompt": "a \ud83d star"}, r"not valid JSON: '\\ud83d' is half a character, whose other half is "),
        (PAIR | {"chosen": 7}, r"'chosen' holds neither an image nor tokens but 7"),
        (PAIR | {"chosen": {"url": "x"}}, r"'chosen' holds neither an image nor tokens but {'url': 'x'}"),
        (PAIR | {"chosen": {"bytes": None, "path": None}}, r"'chosen' holds neither an image nor tokens but None"),
        (PAIR | {"rejected": [*ONES[:15], True]}, r"token True is not a whole number"),
        (PAIR | {"rejected": [{"role": "user"}]}, r"token {'role': 'user'} is not a whole number"),
        (PAIR | {"rejected": ""}, r" cannot be read: it is no file"),
        (PAIR | {"rejected": "deep.png"}, r"deep.png has the mode I;16, more than 8 bits"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(
    decoder: CompactDecoder, tmp_path: Path, row: Any, sentence: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.new("I;16", (64, 64)).save(tmp_path / "deep.png")
    source = write(tmp_path, PAIR, row)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: .*" + sentence) as refused:
        source.encode(decoder, 8)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("token", [32, -1])
def test_rows_of_all_files_are_checked_before_anything_is_moved(
    decoder: CompactDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    paths = [tmp_path / name for name in ("train.jsonl", "validation.jsonl")]
    for path, rejected in zip(paths, (TWOS, [*ONES[:15], token]), strict=True):
        path.write_text(json.dumps(PAIR | {"rejected": rejected}) + "\n")
    files = [PreferenceFile(str(path), "train", COLUMNS) for path in paths]
    data: Any = PreferenceFilesDataModule(*files, str(tmp_path), 1, 1)
    data.trainer = SimpleNamespace(is_global_zero=True, lightning_module=SimpleNamespace(decoder=decoder))
    monkeypatch.setattr(CompactDecoder, "to", lambda *_: pytest.fail("moved"))
    with pytest.raises(ValueError, match=rf"validation\.jsonl:1: token {token} is not in 0\.\.31"):
        data.setup("fit")


def test_what_is_no_preference_file_is_refused(
    decoder: CompactDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pairs\.jsonl has no rows$"):
        write(tmp_path).encode(decoder, 8)
    for path in ("nowhere.jsonl", "some/nowhere.jsonl", "nowhere", "nowhere.csv", "/no/where", "./no/where", "''"):
        with pytest.raises(FileNotFoundError, match=rf"there is no preference file or folder {path}$"):
            PreferenceFile(path.strip("'"), "train", COLUMNS)
    for name in ("pairs.json", "pairs.csv", "pairs.jsonl.gz", "pairs"):
        Path(name).write_text("[]")
        with pytest.raises(ValueError, match=rf"{name} is no \.jsonl file; preferences are one JSON object a line"):
            PreferenceFile(name, "train", COLUMNS)
    Path("folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder is no whole folder written by `datasets`: there is no"):
        PreferenceFile("folder", "train", COLUMNS)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"some/where is no folder, nor to be had from the hub: Couldn't reach"):
        PreferenceFile("some/where", "train", COLUMNS).check(decoder)
    for columns, sentence in (
        ({"prompt": "prompt", "chosen": "chosen"}, r"data.train.columns must name the column for 'rejected'"),
        (COLUMNS | {"weight": "votes"}, r"data.train.columns: 'weight' is none of prompt, chosen, rejected, label"),
    ):
        with pytest.raises(ValueError, match=sentence):
            PreferenceFile("pairs.jsonl", "train", columns)


def test_the_key_changes_with_all_that_pairs_are_made_of_and_with_nothing_else(
    decoder: CompactDecoder, tmp_path: Path, images: list[np.ndarray]
) -> None:
    first, second = PAIR | {"chosen": "0.png"}, PAIR | {"rejected": "1.png", "weight": 0.5}
    key = write(tmp_path, first, second).check(decoder)

    def replace(name: str) -> None:
        path = tmp_path / name
        path.write_bytes(path.read_bytes() + b"\0")

    different: list[Callable[[], PreferenceFile]] = [
        lambda: write(tmp_path, second, first),
        lambda: write(tmp_path, first),
        lambda: write(tmp_path, first, second, second),
        lambda: write(tmp_path, first | {"prompt": "a photo of a heart"}, second),
        lambda: write(tmp_path, first | {"chosen": "1.png"}, second),
        lambda: write(tmp_path, first | {"rejected": ONES}, second),
        lambda: write(tmp_path, first | {"weight": 0.5}, second),
        lambda: PreferenceFile(
            write(tmp_path, first, second).path, "train", COLUMNS | {"chosen": "rejected", "rejected": "chosen"}
        ),
        lambda: (replace("0.png"), write(tmp_path, first, second))[1],
        lambda: (replace("1.png"), write(tmp_path, first, second))[1],
    ]
    keys = [make().check(decoder) for make in different]
    assert len({key, *keys}) == 1 + len(different)
    now = write(tmp_path, first, second).check(decoder)
    os.utime(tmp_path / "0.png", (0, 0))
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    same = [
        write(tmp_path, first, second),
        write(moved, first | {"weight": 1, "note": "x"}, "", second),
        PreferenceFile(write(tmp_path, first, second).path, "other", COLUMNS | {"label": None}),
    ]
    assert {source.check(decoder) for source in same} == {now}


def test_the_key_of_a_data_set_is_that_of_its_rows(
    decoder: CompactDecoder, tmp_path: Path, images: list[np.ndarray]
) -> None:
    def key(split: str, labels: list[float | None], **columns: Any) -> str:
        return PreferenceFile(hub(tmp_path, labels), split, LABELLED | columns).check(decoder)

    keys = [key("train", [1.0, 0.0]), key("train", [1.0, 1.0]), key("train", [1.0]), key("train", [1.0], label=None)]
    assert keys[2] == keys[3] == key("test", [1.0, 0.0]) and len(set(keys)) == 3
    assert key("train", [1.0, 0.5]) == keys[2]  # ties are left out
    Image.fromarray(images[1][::-1]).save(tmp_path / "0.png")
    assert key("train", [1.0]) != keys[2]


def test_a_broken_image_in_a_data_set_is_named_by_row(decoder: CompactDecoder, tmp_path: Path) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    good = {"bytes": None, "path": str(tmp_path / "0.png")}
    Image.fromarray(ShapesStream(split="train", seed=0)[0].image).save(tmp_path / "0.png")
    made = {"prompt": [PROMPT], "chosen": [good], "rejected": [{"bytes": b"nonsense", "path": None}]}
    datasets.Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"set, row 0: the image in 'rejected' cannot be read"):
        PreferenceFile(str(tmp_path / "set"), "train", COLUMNS).encode(decoder, 8)


def test_images_by_path_lie_beside_their_file(
    decoder: CompactDecoder, tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is run, and whether a path comes as a text or as `datasets` writes it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    monkeypatch.chdir(elsewhere)
    beside = {"chosen": {"bytes": None, "path": "0.png"}, "rejected": "1.png"}
    rows = write(tmp_path, PAIR | beside, PAIR | {"chosen": "0.png", "rejected": "1.png"}).encode(decoder, 4)
    assert rows["chosen"][0] == rows["chosen"][1] != rows["rejected"][0]


def test_weights_that_are_all_zero_are_refused(decoder: CompactDecoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs\.jsonl: all weights are 0, so nothing would be learned"):
        write(tmp_path, PAIR | {"weight": 0}).encode(decoder, 4)
