"""The folder of a data set that `datasets` has written, checked without importing it, which takes seconds."""

from pathlib import Path

from lightning_modules.broken_files import read_json


def refuse_other_folder(path: str, split: str) -> None:
    """Refuse a folder that `datasets` has not written (FileNotFoundError), or without such a split (ValueError).

    What is no folder may be a data set on the Hugging Face hub.
    """
    if not Path(path).is_dir():
        return
    splits = Path(path, "dataset_dict.json")
    if not any(file.is_file() for file in (splits, Path(path, "state.json"))):
        lacking = "it has neither state.json nor dataset_dict.json"
        raise FileNotFoundError(f"{path} is no whole folder written by `datasets`: {lacking}")
    named = read_json(splits) if splits.is_file() else None
    there = named.get("splits") if isinstance(named, dict) else None
    if isinstance(there, list) and split not in there:
        raise ValueError(f"{path} has no split {split!r}; there are: {', '.join(map(str, there))}")
