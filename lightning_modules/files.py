"""Files and folders that appear whole or not at all, whoever else writes to the same place."""

import errno
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"  # the package's own weights and prompts
_PARTIAL = re.compile(r"\.(?P<machine>.+)\.(?P<process>\d+)\.[0-9a-f]{8}\.partial")
_ELSEWHERE = 24 * 3600.0  # seconds after which what a process of another machine writes is taken for abandoned
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMED = 3  # things in a folder that an error names
PROVENANCE = "provenance.json"  # says what has made a folder


def is_read_only(error: OSError) -> bool:
    """Tell if an error means that this user may not write there."""
    return error.errno in _REFUSED


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a hidden path beside `path`: the file or folder written there becomes `path` at the end.

    Several processes can write the same one at once: the last file stays, and the first folder. After an error nothing
    is left; what killed processes have left in this folder is removed. Raises OSError, naming `path`.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent)
        partial = path.parent / f".{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        try:
            yield partial
            try:
                os.replace(partial, path)
            except OSError:
                if not (partial.is_dir() and path.is_dir()):
                    raise
        finally:
            remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_once(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or a folder unless it is there: one process makes it, the others wait. Raises OSError, naming `path`.

    `make` writes it to the path that it is given. What is there is neither locked nor written to.
    """
    if path.exists():
        return
    from filelock import FileLock  # takes a thirtieth of the time in which a wrong command is refused

    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with FileLock(lock):
            if not path.exists():
                with whole(path) as partial:
                    make(partial)
            # Whoever gets this lock after its file is removed, or another one of the same name, finds `path`.
            lock.unlink(missing_ok=True)


def refuse_unwritable(folder: Path) -> None:
    """Create a folder; raises OSError, naming it, if nothing can be written there."""
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def is_writable(folder: Path) -> bool:
    """Say if files can be made in a folder that is there."""
    try:
        refuse_unwritable(folder)
    except OSError:
        return False
    return True


def refuse_unmarked(folder: Path) -> None:
    """Raise ValueError if a folder holds more than hidden files, and no provenance.json that says what made them."""
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    # In this order: another process may be opening it at this moment.
    if found and not (folder / PROVENANCE).is_file():
        said = "no provenance.json that says it was made here"
        raise ValueError(f"{folder} holds {some_of(found)}, and {said}: name another folder")


def refuse_other_provenance(folder: Path, different: Sequence[str]) -> None:
    """Raise ValueError if what is in a folder was made with other settings, whose names are given."""
    if different:
        said = f"was made with other settings ({', '.join(different)})"
        raise ValueError(f"what is in {folder} {said}: name another folder")


def some_of(names: Sequence[str]) -> str:
    """List the first of some names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have errors in writing `path` name it; libraries name nothing, or a temporary file."""
    try:
        yield
    except OSError as error:
        below = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(path.parent)
        if below and error.errno in (*_REFUSED, *_FULL):
            error.filename = str(path)
        raise


def _machine() -> str:
    """Name where numbers of processes mean the same: a machine, or one of its containers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()}-{namespace.stat().st_ino if namespace.exists() else 0}"


@cache
def _tidy(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder."""
    for path in folder.glob(".*.partial"):
        if (found := _PARTIAL.fullmatch(path.name)) and _is_abandoned(path, found["machine"], int(found["process"])):
            remove(path)


def _is_abandoned(path: Path, machine: str, process: int) -> bool:
    try:
        if machine != _machine():
            return time.time() - path.stat().st_mtime > _ELSEWHERE
        os.kill(process, 0)
    except PermissionError:  # another user's
        return False
    except (ProcessLookupError, FileNotFoundError):  # it has ended; or the file has gone meanwhile
        return True
    return False


def remove(path: Path) -> None:
    """Remove a file or a folder as far as possible: it may be gone already, or another user's."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
