"""Tells what is wrong with a file of weights or settings, before a library says so in words of its own."""

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

_ARCHIVES = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_COPY = "copy or download it again"


def refuse_broken(path: Path, key: str | None = None) -> None:
    """Raise ValueError, naming the file, if it is another thing than its name says.

    Args:
        path: of a file of weights (.ckpt, .safetensors, .bin) or of settings (.json).
        key: of the config, if it is known; the sentence begins with it.
    """
    if complaint := _complaint(path):
        raise ValueError(f"{key}: {path} {complaint}" if key else f"{path} {complaint}")


def refuse_broken_folder(folder: Path) -> None:
    """The same for all weights and settings in a folder that a library is going to read."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
            refuse_broken(path)


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object; raises ValueError, naming the file, if it does not."""
    refuse_broken(path)
    settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a list instead of settings")
    return settings


def read_torch(path: Path, key: str | None = None) -> Any:
    """What `torch.save` wrote, on the CPU; raises ValueError, as `refuse_broken` does, for what is not plain data."""
    refuse_broken(path, key)
    named = f"{key}: {path}" if key else path
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except UnpicklingError as error:
        raise ValueError(f"{named} holds more than tensors and is not loaded") from error
    except Exception as error:  # of any kind, where bytes are not what the archive says
        raise ValueError(f"{named} is broken: {first_line(error)}") from error


def refuse_damaged(path: Path, key: str) -> None:
    """Raise ValueError if some byte of a file of `torch.save` has changed since: torch would load it all the same."""
    refuse_broken(path, key)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{key}: {path} is broken ({first_line(error)}): {_COPY}") from error
    if damaged is not None:
        raise ValueError(f"{key}: {path} is broken (in {damaged}): {_COPY}")


def first_line(error: BaseException) -> str:
    """What an error of some library says, without the advice and the lists that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__


def _complaint(path: Path) -> str | None:
    """What is wrong, as the end of a sentence."""
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty: {_COPY}"
    if head.startswith((b"version https://git-lfs", b"version https://hawser")):
        return "is a git-lfs pointer: run `git lfs pull` where it comes from"
    if text.startswith((b"<!doctype", b"<html", b"<!--", b"<?xml", b"<error")):
        return "is an HTML page: download the file itself"
    if not any(head):
        return f"holds nothing but zeros: {_COPY}"
    if archives := [name for start, name in _ARCHIVES.items() if head.startswith(start)]:
        return f"is a {archives[0]} archive: unpack it"
    if path.suffix == ".json":
        return _of_json(path)
    if b"\0" not in head and len(head) > 8 and text.isascii():
        return f"is a text that begins with {head[:40].decode(errors='replace')!r}: {_COPY}"
    return _of_safetensors(path, head) if path.suffix == ".safetensors" else _of_torch(path, head)


def _of_json(path: Path) -> str | None:
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:  # broken JSON or broken UTF-8
        return f"is not valid JSON: {first_line(error)}"
    return None if isinstance(settings, dict | list) else f"holds {settings!r} instead of settings"


def _of_safetensors(path: Path, head: bytes) -> str | None:
    """It begins with the length of a header of JSON, which says where the tensors are."""
    size = path.stat().st_size
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] != b"{":
        return f"is not a safetensors file: {_COPY}"
    whole = 8 + length
    if whole <= size:
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(whole)[8:])
                whole += max(
                    (entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"), default=0
                )
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                return f"is not a safetensors file: {_COPY}"
    return f"is cut off: it has {size} of {whole} bytes; {_COPY}" if size < whole else None


def _of_torch(path: Path, head: bytes) -> str | None:
    """It is a zip archive whose list of contents comes last."""
    if head[8:9] == b"{" and _of_safetensors(path, head) is None:
        return "holds weights alone, as safetensors; a checkpoint of training is a .ckpt file"
    if head.startswith(b"\x80"):
        return "is of torch's old format: load it and save it anew with `torch.save`"
    if not head.startswith(b"PK"):
        return f"is no file that torch has written: {_COPY}"
    if not zipfile.is_zipfile(path):
        return f"is cut off: {_COPY}"
    try:
        with zipfile.ZipFile(path) as archive:
            written_by_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        return f"is broken ({first_line(error)}): {_COPY}"
    return None if written_by_torch else "is a zip archive that torch has not written"


def read_json(path: Path) -> Any:
    """What a file holds as JSON; None if that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
