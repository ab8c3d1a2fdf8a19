"""The folder of a data set that `datasets` has written, checked without importing it, which takes seconds."""

from pathlib import Path
from typing import Any

from lightning_modules.broken_files import read_settings


def stored_columns(path: str, split: str) -> list[str] | None:
    """Check a folder that `datasets` has written and return its columns; None for what may be a data set on the hub.

    Raises FileNotFoundError if another program has written it or a file is missing, ValueError if a file is broken, or
    there is no such split, or there are no rows.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    if not (folder / "dataset_dict.json").is_file():
        return _columns(folder, path)
    splits = read_settings(folder / "dataset_dict.json").get("splits", [])
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; there are: {', '.join(map(str, splits))}")
    return {name: _columns(folder / name, path) for name in splits}[split]  # all of them are loaded


def _columns(folder: Path, path: str) -> list[str]:
    """Check the folder of a split and return its columns."""
    if missing := [name for name in ("state.json", "dataset_info.json") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{path} is no whole folder written by `datasets`: there is no {folder / missing[0]}")
    files: list[dict[str, Any]] = read_settings(folder / "state.json").get("_data_files", [])
    for file in files:
        if not (folder / file["filename"]).is_file():
            raise FileNotFoundError(f"{path} is no whole folder: there is no {folder / file['filename']}")
    if not files:
        raise ValueError(f"{folder} has no rows")
    return [*read_settings(folder / "dataset_info.json").get("features", {})]
