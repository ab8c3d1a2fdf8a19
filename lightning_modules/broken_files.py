"""Explains what is wrong with a file of weights or settings, before a library says so in words of its own."""

import io
import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

_COPY = "copy or download it again"
_WEIGHTS_ALONE = "holds weights alone, as safetensors; a checkpoint of training is a .ckpt file"
_NOT_PLAIN = (
    "holds more than tensors and is not loaded, because that could run code: if you trust it, load it once with "
    "`torch.load(FILE, weights_only=False)` and save its tensors alone with `torch.save`"
)
# What is wrong with files that begin like this, in lower case.
_BEGINNINGS: dict[str, bytes | tuple[bytes, ...]] = {
    "is a git-lfs pointer: run `git lfs pull` where it comes from": b"version https://",
    "is an HTML page: download the file itself": (b"<!doctype", b"<html", b"<!--", b"<?xml", b"<error"),
    "is a gzip archive: unpack it": b"\x1f\x8b",
    "is a xz archive: unpack it": b"\xfd7zxz",
    "is a bzip2 archive: unpack it": b"bzh",
    "is a zstd archive: unpack it": b"\x28\xb5\x2f\xfd",
}


def refuse_broken(path: Path, key: str | None = None) -> None:
    """Raise ValueError, naming file and key, if it is no weights (.ckpt, .safetensors, .bin) or settings (.json)."""
    if complaint := _complaint(path):
        raise ValueError(f"{_named(path, key)} {complaint}")


def refuse_broken_folder(folder: Path) -> None:
    """Do the same for all weights and settings in a folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
            refuse_broken(path)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises ValueError, naming the file, if it does not."""
    refuse_broken(path)
    settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a list instead of settings")
    return settings


def read_json(path: Path) -> Any:
    """Read a JSON file; returns None if that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def read_torch(path: Path, key: str | None = None, thorough: bool = False) -> Any:
    """Read what `torch.save` wrote, on the CPU; raises ValueError, as `refuse_broken` does, for what is not plain data.

    `thorough` refuses a file in which some byte has changed since; torch would load it all the same.
    """
    import torch  # takes seconds, and most of what is refused needs it not

    _refuse_safetensors(path, key)
    refuse_broken(path, key)
    try:
        if thorough:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"in {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except UnpicklingError as error:
        raise ValueError(f"{_named(path, key)} {_NOT_PLAIN}") from error
    except Exception as error:  # of any kind, where bytes are not what the archive says
        raise ValueError(f"{_named(path, key)} is broken ({first_line(error)}): {_COPY}") from error


def read_without_tensors(path: Path, key: str | None = None) -> Any:
    """Read the plain data that `torch.save` wrote beside tensors; torch, which takes seconds, is not imported.

    Nothing of the file's is imported or run. Returns None for what only `read_torch` can tell. Raises ValueError, as
    that does, for what holds things of other packages.
    """
    _refuse_safetensors(path, key)
    refuse_broken(path, key)
    reader = None
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            reader = _WithoutTensors(io.BytesIO(archive.read(name)))
            return reader.load()
    except Exception as error:  # of any kind, where bytes are not what the archive says
        if reader is not None and reader.foreign:
            raise ValueError(f"{_named(path, key)} {_NOT_PLAIN}") from error
        return None


def _refuse_safetensors(path: Path, key: str | None) -> None:
    if path.suffix == ".safetensors":
        raise ValueError(f"{_named(path, key)} {_WEIGHTS_ALONE}")


class _StandIn:
    """Something of torch's."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _WithoutTensors(Unpickler):
    foreign = False  # something of a package that torch would not load from either has been met

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if package == "torch":
            return _StandIn
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        self.foreign = package not in ("builtins", "collections", "_codecs")
        raise UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        """Leave out the numbers of a tensor."""


def first_line(error: BaseException) -> str:
    """Return what an error of some library says, without the advice and the lists that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__


def _named(path: Path, key: str | None) -> str:
    return f"{key}: {path}" if key else str(path)


def _complaint(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty: {_COPY}"
    if not any(head):
        return f"holds nothing but zeros: {_COPY}"
    if known := [complaint for complaint, starts in _BEGINNINGS.items() if text.startswith(starts)]:
        return known[0]
    if path.suffix == ".json":
        try:
            settings = json.loads(path.read_bytes())
        except ValueError as error:  # broken JSON or broken UTF-8
            return f"is not valid JSON: {first_line(error)}"
        return None if isinstance(settings, dict | list) else f"holds {settings!r} instead of settings"
    if b"\0" not in head and len(head) > 8 and text.isascii():
        return f"is a text that begins with {head[:40].decode(errors='replace')!r}: {_COPY}"
    return _of_safetensors(path, head) if path.suffix == ".safetensors" else _of_torch(path, head)


def _of_safetensors(path: Path, head: bytes) -> str | None:
    """Check a file that begins with the length of a header of JSON, which says where the tensors are."""
    size, whole = path.stat().st_size, 8 + int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] != b"{":
        return f"is not a safetensors file: {_COPY}"
    if whole <= size:
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(whole)[8:])
                whole += max([0, *(entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__")])
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                return f"is not a safetensors file: {_COPY}"
    return f"is cut off: it has {size} of {whole} bytes; {_COPY}" if size < whole else None


def _of_torch(path: Path, head: bytes) -> str | None:
    """Check a file that is a zip archive, whose list of contents comes last."""
    if head[8:9] == b"{" and _of_safetensors(path, head) is None:
        return _WEIGHTS_ALONE
    if head.startswith(b"\x80"):
        return "is of torch's old format: load it and save it anew with `torch.save`"
    if not head.startswith(b"PK"):
        return f"is no file that torch has written: {_COPY}"
    if not zipfile.is_zipfile(path):
        return f"is cut off: {_COPY}"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/data.pkl") for name in archive.namelist()):
                return None
    except zipfile.BadZipFile as error:
        return f"is broken ({first_line(error)}): {_COPY}"
    return "is a zip archive that torch has not written"
