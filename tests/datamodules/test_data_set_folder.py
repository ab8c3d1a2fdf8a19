"""Folders written by `datasets`, read without it: the same rows, or a sentence."""

from pathlib import Path

import pytest
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, Json, List, Value
from PIL import Image as Picture

from datamodules.data_set_folder import stored_split
from datamodules.data_sets import load_split

FEATURES = Features(
    {
        "prompt": Value("string"),
        "tokens": List(Value("int32")),
        "include": List({"class": Value("string"), "position": List(Value("string"))}),
        "image": Image(),
        "label": ClassLabel(names=["a", "b"]),
        "surplus": Value("float32"),
    }
)


def test_rows_are_those_that_datasets_reads(tmp_path: Path) -> None:
    place = {"class": "star", "position": None}
    row = {"tokens": [1, 2], "include": [place], "image": Picture.new("RGB", (4, 4)), "label": "b", "surplus": 1.0}
    rows = [row | {"prompt": str(number), "include": [place] * (number % 3)} for number in range(150)]
    Dataset.from_list([*rows, row | {"prompt": None}], features=FEATURES).save_to_disk(tmp_path, num_shards=2)
    columns = [name for name in FEATURES if name != "surplus"]
    stored, loaded = stored_split(str(tmp_path), "train"), load_split(str(tmp_path), "train").select_columns(columns)
    assert stored is not None and stored.is_plain(columns) and len(stored.files) == 2
    assert list(stored.rows(columns)) == list(loaded.to_iterable_dataset().decode(False))


def test_what_datasets_alone_can_read_is_left_to_it(tmp_path: Path) -> None:
    features = Features({"grid": Array2D((1, 1), "int32"), "metadata": Json(), "prompt": Value("string")})
    Dataset.from_list([{"grid": [[1]], "metadata": {"a": 1}, "prompt": "x"}], features=features).save_to_disk(tmp_path)
    stored = stored_split(str(tmp_path), "train")
    assert stored is not None and stored.is_plain(["prompt"])
    assert not stored.is_plain(["grid"]) and not stored.is_plain(["metadata"])


def test_splits_and_broken_files_are_named(tmp_path: Path) -> None:
    sets = {name: Dataset.from_dict({"prompt": [name] * 100}) for name in ("train", "test")}
    DatasetDict(sets).save_to_disk(tmp_path)
    stored = stored_split(str(tmp_path), "test")
    assert stored is not None and next(iter(stored.rows(["prompt"]))) == {"prompt": "test"}
    stored.files[0].write_bytes(stored.files[0].read_bytes()[:600])
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path} is no whole folder .*: {stored.files[0]}: "):
        list(stored.rows(["prompt"]))
    with pytest.raises(ValueError, match=r"has no split 'validation'; there are: train, test"):
        stored_split(str(tmp_path), "validation")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("state.json", "{}", "is not as `datasets` writes it"),
        ("state.json", '{"_data_files": [{}]}', "is not as `datasets` writes it"),
        ("state.json", '{"_data_files": ["x"]}', "is not as `datasets` writes it"),
        ("state.json", '{"_data_files": []}', "has no rows"),
        ("dataset_info.json", '{"features": null}', "is not as `datasets` writes it"),
        ("dataset_info.json", '{"features": {"prompt": "string"}}', "is not as `datasets` writes it"),
        ("dataset_dict.json", '{"splits": "train"}', "lists no splits"),
    ],
)
def test_settings_of_another_form_are_refused(file: str, text: str, said: str, tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": ["x"]}).save_to_disk(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*{said}$"):
        stored_split(str(tmp_path), "train")


def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(tmp_path: Path) -> None:
    assert stored_split("OWNER/NAME", "train") is None
    (tmp_path / "x.jsonl").touch()
    for path, said in (("", "does not exist"), ("gone", "does not exist"), (f"{tmp_path}/x.jsonl", "is a file")):
        with pytest.raises(
            FileNotFoundError, match=f"^'{path}' {said}: a data set is a folder written by `datasets`, "
        ):
            stored_split(path, "train")
