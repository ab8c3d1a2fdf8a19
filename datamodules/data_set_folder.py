"""The folder of a data set that `datasets` has written, read without importing it, which takes seconds."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.broken_files import first_line, read_settings

_SLICE = 64  # rows that are Python objects at a time; an image may take a megabyte


@dataclass(frozen=True)
class StoredSplit:
    """A split of a data set in a folder: its files, in the order of the rows, and what its columns hold."""

    path: str  # of the data set
    files: tuple[Path, ...]
    features: Mapping[str, Any]

    def is_plain(self, columns: Collection[str]) -> bool:
        """Say if these columns mean what the files hold; `datasets` alone knows how to read others."""
        return all(_is_plain(feature) for name, feature in self.features.items() if name in columns)

    def rows(self, columns: Collection[str]) -> Iterator[dict[str, Any]]:
        """Read these columns, where there are such; images are `{"bytes": ..., "path": ...}`.

        Raises FileNotFoundError if a file cannot be read to its end.
        """
        import pyarrow as pa  # imports numpy

        used = [name for name in self.features if name in columns]
        for file in self.files:
            try:
                with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
                    for batch in batches:
                        part = batch.select(used)
                        for start in range(0, len(part), _SLICE):
                            yield from part.slice(start, _SLICE).to_pylist()
            except (pa.ArrowException, OSError, KeyError) as error:
                wanted = f"{self.path} is no whole folder written by `datasets`"
                raise FileNotFoundError(f"{wanted}: {file}: {first_line(error)}") from None


def has_name_on_hub(path: str) -> bool:
    """Say if this is OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def stored_split(path: str, split: str) -> StoredSplit | None:
    """Check a folder that `datasets` has written, but for its rows; None for what may be a data set on the hub.

    Raises FileNotFoundError if there is no such folder, another program has written it or a file is missing, ValueError
    if a file is broken, or there is no such split, or there are no rows.
    """
    folder = Path(path)
    if not path or not (folder.is_dir() or has_name_on_hub(path)):
        said = "is a file" if path and folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path!r} {said}: a data set is a folder written by `datasets`, or OWNER/NAME on the hub"
        )
    if not folder.is_dir():
        return None
    if not (folder / "dataset_dict.json").is_file():
        return _open(folder, path)
    splits = read_settings(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list):
        raise ValueError(f"{folder / 'dataset_dict.json'} lists no splits")
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; there are: {', '.join(map(str, splits))}")
    return {name: _open(folder / name, path) for name in splits}[split]  # `datasets` loads all of them


def _open(folder: Path, path: str) -> StoredSplit:
    """Check the folder of a split."""
    if missing := [name for name in ("state.json", "dataset_info.json") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{path} is no whole folder written by `datasets`: there is no {folder / missing[0]}")
    state, info = (read_settings(folder / name) for name in ("state.json", "dataset_info.json"))
    try:
        files, features = [folder / file["filename"] for file in state["_data_files"]], {**info["features"]}
        if not all(isinstance(feature, Mapping | list) for feature in features.values()):
            raise TypeError
    except (LookupError, TypeError):
        raise ValueError(f"{folder}: state.json or dataset_info.json is not as `datasets` writes it") from None
    if gone := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path} is no whole folder: there is no {gone[0]}")
    if not files:
        raise ValueError(f"{folder} has no rows")
    return StoredSplit(path, tuple(files), features)


def _is_plain(feature: Any) -> bool:
    kind = feature.get("_type") if isinstance(feature, Mapping) else "unknown"
    if kind is None:  # a column of columns
        return all(_is_plain(part) for part in feature.values())
    if kind in ("List", "LargeList"):
        return _is_plain(feature.get("feature"))
    return kind in ("Value", "ClassLabel", "Image")
