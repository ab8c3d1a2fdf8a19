"""Data sets of `datasets`, from a folder or from the Hugging Face hub."""

from pathlib import Path

import datasets
from datasets import Dataset


def load_split(path: str, split: str) -> Dataset:
    """The rows of a folder written by `datasets` (of its split, where it has several), or of OWNER/NAME on the hub.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has none or cannot be reached.
        ValueError: there is no such split.
    """
    is_folder = Path(path).is_dir()
    try:
        found = datasets.load_from_disk(path) if is_folder else datasets.load_dataset(path, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        wanted = "no whole folder written by `datasets`" if is_folder else "no folder, nor to be had from the hub"
        cause = (str(error).splitlines() or [repr(error)])[0]
        raise FileNotFoundError(f"{path} is {wanted}: {cause}") from None
    if not isinstance(found, Dataset):
        if split not in found:
            raise ValueError(f"{path} has no split {split!r}; there are: {', '.join(map(str, found))}")
        found = found[split]
    return found.with_format(None)  # rows are to be plain values, whatever they were when they were written
