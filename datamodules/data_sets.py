"""Data sets of `datasets`: from a folder or the Hugging Face hub, or made by runs and stored by what made them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets import Dataset
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loaders import make_loader
from lightning_modules.artifacts import ArtifactCache, Key
from lightning_modules.broken_files import first_line


def load_split(path: str, split: str) -> Dataset:
    """Load rows from a folder written by `datasets` (from its split, where it has several), or OWNER/NAME on the hub.

    Raises FileNotFoundError if it is not there or the hub cannot be reached, ValueError if it has no such split.
    """
    is_folder = Path(path).is_dir()
    try:
        found = datasets.load_from_disk(path) if is_folder else datasets.load_dataset(path, split=split)
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        wanted = "no whole folder written by `datasets`" if is_folder else "no folder, nor to be had from the hub"
        raise FileNotFoundError(f"{path} is {wanted}: {first_line(error)}") from None
    if not isinstance(found, Dataset):
        if split not in found:
            raise ValueError(f"{path} has no split {split!r}; there are: {', '.join(map(str, found))}")
        found = found[split]
    return found.with_format(None)  # rows are to be plain values, whatever they were when they were written


def write_rows(rows: Dataset, folder: Path) -> None:
    """Write a data set, without a bar: one for every part would drown that of the collection."""
    datasets.disable_progress_bars()
    rows.save_to_disk(str(folder))


def get_rows(cache: ArtifactCache, name: str, key: Key, make: Callable[[], Dataset]) -> Path:
    """Return the folder of a data set in a cache, which is made if it is not there; see `ArtifactCache.get`."""

    return cache.get(name, key, lambda partial: write_rows(make(), partial))


def load_rows(folder: Path) -> Dataset:
    """Load what `get_rows` has stored; raises ValueError, naming the folder, if a file of it is broken."""
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is broken ({first_line(error)}): remove it, and it is made again") from error


def as_column(part: Tensor) -> Any:
    """A column of codes or numbers [B, ...], or of vectors [B, T, D]: these as bytes, for Arrow's lists take long."""
    if not part.is_floating_point():
        return part.cpu().numpy().astype("int32")
    if part.ndim < 3:
        return part.cpu().numpy()
    return [row.tobytes() for row in part.half().cpu().numpy()]


class ArrowRows(torch.utils.data.Dataset[pa.Table]):
    """The rows of a data set, of which a loader takes batches as tables of Arrow, without a Python object a value."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> pa.Table:
        return self.rows[indices]


def numbers(rows: pa.Table, column: str) -> Tensor:
    """Return a column of numbers, or of lists of them that are as long in all rows, as [B, ...]."""
    values, shape = rows[column].combine_chunks(), [len(rows)]
    while pa.types.is_list(values.type):
        inner = values.flatten()
        shape.append(len(inner) // len(values))
        values = inner
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).reshape(shape).copy())


class StoredDataModule(LightningDataModule):
    """Loaders of stored rows; checkpoints keep their folders.

    Args:
        folder: of all stored rows.
        batch_size: rows a training batch, per rank.
        collect_batch_size: images decoded, encoded or scored at a time; rows a batch of validation and test.
    """

    trainer: Trainer  # it calls the hooks, so there is one

    def __init__(self, folder: str, batch_size: int, collect_batch_size: int) -> None:
        super().__init__()
        self.cache = ArtifactCache(folder, type(self).__module__)
        self.batch_size, self.collect_batch_size = batch_size, collect_batch_size
        self._folders: dict[str, str] = {}  # of each set, as the run has seen it; the name says what made it

    def state_dict(self) -> dict[str, Any]:
        return {"folders": dict(self._folders)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folders = dict(state_dict["folders"])

    def _loader(
        self, rows: torch.utils.data.Dataset[Any], collate: Callable[[Any], dict[str, Any]], train: bool
    ) -> DataLoader[dict[str, Any]]:
        """Load batches of training in a new order every epoch, others in the order of the rows."""
        batch_size = self.batch_size if train else self.collect_batch_size
        return make_loader(rows, self.trainer, batch_size, collate, train=train, shuffle=train)
