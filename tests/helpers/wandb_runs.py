"""What is in the file of an offline W&B run: records of wandb's own protocol, in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7  # bytes; a record's header: checksum, length, kind


def records(path: Path) -> Iterator[Any]:
    """The records of a run-ID.wandb file, in order."""
    data, place, record = path.read_bytes(), _FILE_HEADER, b""
    while place + _HEADER <= len(data):
        if (room := _BLOCK - place % _BLOCK) < _HEADER:
            place += room  # too little for a header: the rest of a block is empty
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary each time."""
    logged = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.item} for entry in logged
    ]


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that the run was given."""
    settings: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "config":
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
    return settings


def artifacts(path: Path) -> list[Any]:
    """The checkpoints that were logged; their files are named by absolute paths."""
    return [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]


def sent_files(path: Path) -> list[Path]:
    """The files of the run that `wandb sync` sends; it looks for them beside the log."""
    logged = [record.files.files for record in records(path) if record.WhichOneof("record_type") == "files"]
    return [path.parent / "files" / entry.path for entries in logged for entry in entries]


def table(path: Path, key: str) -> list[dict[str, Any]]:
    """The rows of the last table of that name; pictures as the paths of their files."""
    logged = [row for row in history(path) if row.get(f"{key}/_type") == "table-file"][-1]
    stored = json.loads((path.parent / "files" / logged[f"{key}/path"]).read_text())
    return [
        {
            name: path.parent / "files" / cell["path"] if isinstance(cell, dict) else cell
            for name, cell in zip(stored["columns"], row, strict=True)
        }
        for row in stored["data"]
    ]
