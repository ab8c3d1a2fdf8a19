"""ArtifactCache: what is stored by what made it, so that it is found again instead of made again."""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.broken_files import read_json
from lightning_modules.files import PROVENANCE, make_once, refuse_other_provenance, refuse_unmarked, refuse_unwritable

PROJECT = Path(__file__).parents[1]
_ROOMS = ("callbacks", "datamodules", "lightning_modules")  # folders of the project's own modules
_CLASS = re.compile(rf'"((?:{"|".join(_ROOMS)})\.[\w.]+)\.\w+"')  # a class as keys name it, with its module
_OLD = re.compile("(.+-)?[0-9a-f]{16}")  # names that earlier versions gave; a digest has more digits now

# The code as this process runs it, whatever is edited meanwhile.
_SOURCES = {path: path.read_bytes() for room in _ROOMS for path in (PROJECT / room).rglob("*.py")}

Key = Mapping[str, Any]


class ArtifactCache:
    """Files and folders that are found by what made them, wherever their root has moved.

    Each appears whole or not at all: one process makes it, and others wait. Reading needs no right to write.

    Args:
        root: the folder that holds them.
        module: name of the module that makes them: its code and that of the classes in a key become part of the key.
            Parts need none, because the name of the whole stands for the code.
        made_with: written to `provenance.json` in the root before anything else is.
    """

    def __init__(self, root: str | Path, module: str = "", made_with: Key | None = None) -> None:
        self.root, self._module, self._made_with = Path(root), module, made_with

    def path(self, name: str, key: Key) -> Path:
        """Return the path of an artifact, made or not: `name.json` becomes `name-DIGEST.json`."""
        stem, dot, suffix = name.partition(".")
        text = json.dumps(self._with_code(key), sort_keys=True)
        return self.root / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:20]}{dot}{suffix}"

    def get(self, name: str, key: Key, make: Callable[[Path], object]) -> Path:
        """Return the path of an artifact; if it is not there, `make` writes a file or a folder to the path it is given.

        `name` is its kind, with the suffix of a file; `key` all that decides its content but the code, as plain data.
        Raises OSError, naming the artifact, if it cannot be written.
        """
        path = self.path(name, key)
        if not path.exists():
            self.open()
            make_once(path, make)
        return path

    def parts(self, name: str, key: Key) -> "ArtifactCache":
        """Return a cache of the parts of an artifact; a killed run loses one of them at most."""
        return ArtifactCache(self.path(name, key), made_with=self._with_code(key))

    def open(self) -> None:
        """Create the root; raises OSError, naming it, if nothing can be written there."""
        _mention_old(self.root.parent if self._made_with else self.root)
        refuse_unwritable(self.root)
        if self._made_with:
            _write_provenance(self.root, self._made_with)

    def find(self, known: str, is_whole: Callable[[Path], bool] = Path.is_dir) -> Path | None:
        """Find an artifact that was at `known`: by its name in the root, then there; None if neither `is_whole`."""
        return next((path for path in (self.root / Path(known).name, Path(known)) if is_whole(path)), None)

    def gone(self, known: str) -> FileNotFoundError:
        """Return the error for an artifact that `find` does not find and that cannot be made again."""
        return FileNotFoundError(
            f"{Path(known).name}, on which the run of this checkpoint was trained, is neither in {self.root} nor in "
            f"{Path(known).parent}, and the models or the code that made it have changed since: set rollouts_dir to "
            "the folder where it is now"
        )

    def _with_code(self, key: Key) -> Key:
        if not self._module:
            return key
        modules = frozenset([self._module, *_CLASS.findall(json.dumps(key))])
        return {"code": source_hash(modules), **key}


@cache
def source_hash(modules: frozenset[str], project: Path = PROJECT) -> str:
    """Hash the code of some modules of a project and of all others that they import, however indirectly."""
    code: dict[str, bytes] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        path = project.joinpath(*name.split(".")).with_suffix(".py")
        if name.split(".")[0] in _ROOMS and name not in code and path.is_file():
            code[name] = _SOURCES.get(path) or path.read_bytes()
            pending += _imported(code[name])
    return hashlib.sha256(b"".join(code[name] for name in sorted(code))).hexdigest()[:16]


@cache
def _imported(code: bytes) -> list[str]:
    """All names that some code imports and that may be modules."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names += [str(node.module), *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            names += [each.name for each in node.names]
    return names


@cache
def _mention_old(root: Path) -> None:
    if any(_OLD.fullmatch(path.name) for path in root.glob("*")):
        rank_zero_info(f"{root}: what an earlier version has stored there is not read, but made again")


def _write_provenance(folder: Path, made_with: Key) -> None:
    text = json.dumps(made_with, indent=2) + "\n"
    make_once(folder / PROVENANCE, lambda partial: partial.write_text(text, encoding="utf-8"))


def open_folder(folder: Path, made_with: Key) -> None:
    """Create a folder that the user names, marked with what it is made with, or make sure that it has this mark.

    Raises OSError, naming it, if it cannot be created, and ValueError if it was made with other things or by others.
    """
    refuse_unmarked(folder)
    _write_provenance(folder, made_with)
    stored = read_json(folder / PROVENANCE)
    if not isinstance(stored, dict) or not made_with.keys() <= stored.keys():
        raise ValueError(f"{folder / PROVENANCE} is not of this project, or of another version: name another folder")
    refuse_other_provenance(folder, [key for key in made_with if stored[key] != json.loads(json.dumps(made_with[key]))])
