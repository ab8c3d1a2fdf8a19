"""Errors as one sentence: what is wrong, and under which key of the config."""

import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lightning_modules.broken_files import first_line

# What the user can mend. Anything else is a fault of the program, whose traceback is worth more than a sentence.
MENDABLE = (ValueError, OSError, ImportError, OmegaConfBaseException, HydraException)

_ROOT = Path(__file__).parents[2]
_OURS = ("callbacks", "datamodules", "lightning_modules", "train.py")
_EXTRAS = {"diffusers": "diffusers", "ftfy": "llamagen", "peft": "lora", "transformers": "showo"}  # of packages
_WRITTEN_TO = ("hydra.run.dir", "rollouts_dir", "scores_dir", "images", "export_dir")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SYSTEM = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "there is no permission"),
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "there is no space left in the quota",
    errno.ENOENT: "there is no such file or folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOTDIR: "it is below a file, not a folder",
    errno.EEXIST: "it is there already, and not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many files are open; raise the limit by `ulimit -n 65536`, or lower num_workers of data",
    errno.EPIPE: "nobody reads the output any more, so the run ends",
    errno.ENFILE: "too many files are open on this machine",
}


def sentence(error: BaseException, unresolved: Mapping[str, Any]) -> str:
    """Put an error into one sentence for the user.

    A message of this project stays whole, others are cut to a line. What a constructor raised is shown with its node,
    what a data loader's process raised as if it were raised here. `unresolved` is the config with its interpolations.
    """
    place = ""
    if isinstance(error, InstantiationException):
        node = re.search("^full_key: (.+)$", str(error), re.MULTILINE)
        place = f" (in {defining_key(unresolved, node[1])})" if node else ""
        error = error.__cause__ or error
    said_already = _is_ours(error) and not isinstance(error, ModuleNotFoundError)
    if not said_already and (package := _missing(error)):
        return f"{package} is not installed: pip install -e '.[{_EXTRAS[package]}]'{place}"
    if isinstance(error, OmegaConfBaseException):
        return _of_config(error, unresolved)
    text = _of_worker(error) or (str(error) if _is_ours(error) else first_line(error))
    if text.startswith("Error loading") and error.__cause__:  # Hydra's, of a class whose module fails
        text = f"{text}: {type(error.__cause__).__name__}: {first_line(error.__cause__)}"
    if isinstance(error, OSError):
        text = _of_system(error, text, unresolved)
    elif not isinstance(error, MENDABLE) and type(error).__name__ != "MisconfigurationException":  # Lightning's own
        text = f"{type(error).__name__}: {text}"
    return text + place


def flat(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a config, those of nodes as well, with what they hold."""
    for name, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{above}{name}", value
        yield from flat(value, f"{above}{name}.")


def defining_key(config: Mapping[str, Any], key: str) -> str:
    """Find the key that defines a node of an unresolved config: what an interpolation leads to has its own."""
    parts: list[str] = key.split(".")
    node: Any = config
    for end, part in enumerate(parts, 1):
        node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, str) and (reference := re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)\}", node)):
            return defining_key(config, ".".join([reference[1], *parts[end:]]))
    return key


def _missing(error: BaseException | None) -> str | None:
    """Return the package of an extra whose absence led to an error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (name := str(error.name).partition(".")[0]) in _EXTRAS:
            return name
        error = error.__cause__ or error.__context__
    return None


def _is_ours(error: BaseException) -> bool:
    return any(_is_our_file(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[-1:])


def _is_our_file(name: str) -> bool:
    return any(Path(name).is_relative_to(_ROOT / room) for room in _OURS)


def _of_worker(error: BaseException) -> str | None:
    """Extract the message of an error that torch has sent from another process, as text with its traceback."""
    text = str(error)
    frames = list(re.finditer(r'^  File "(.+)", line \d+, in .+\n(?:    .*\n)*', text, re.MULTILINE))
    if not (frames and re.match(r"Caught \w+ in ", text)):
        return None
    message = text[frames[-1].end() :].strip().partition(": ")[2]
    return message if _is_our_file(frames[-1][1]) else message.partition("\n")[0]


def _of_system(error: OSError, text: str, unresolved: Mapping[str, Any]) -> str:
    """Say what the system refuses, after the key of the config whose folder it is in."""
    texts = {key: value for key, value in flat(unresolved) if isinstance(value, str)}
    paths = {key: value for key, value in texts.items() if value not in ("", ".", "/") and "${" not in value}
    number, said, path = error.errno, error.strerror, error.filename
    if found := re.match(r"\[Errno (\d+)\] (.+?)(?:: '(.+?)')?(?: -> '.+')?$", text):
        number, said, path = int(found[1]), found[2], found[3]
    elif number is None or said is None or path is None:
        key = next((key for key, value in paths.items() if "/" in value and value in text), None)
        return f"{key}: {text}" if key and not _is_ours(error) else text
    what = _SYSTEM.get(number, said)
    if path is None:
        space = {f"{key}={value}": _free_space(value) for key, value in paths.items() if key in _WRITTEN_TO}
        fullest = [setting for setting, free in space.items() if free == min(space.values())]
        return f"{what}, where {' and '.join(fullest)} is" if space and number in _FULL else what
    full, above = os.path.abspath(str(path)), {key: os.path.abspath(value) for key, value in paths.items()}
    keys = [key for key, folder in above.items() if f"{full}/".startswith(f"{folder}/")]
    key = max(keys, key=lambda key: len(above[key]), default=None)
    return f"{key}: {path}: {what}" if key else f"{path}: {what}"


def _free_space(path: str) -> int:
    folder = Path(path).absolute()
    return shutil.disk_usage(next(parent for parent in [folder, *folder.parents] if parent.exists())).free


def _of_config(error: OmegaConfBaseException, unresolved: Mapping[str, Any]) -> str:
    text, full_key = first_line(error), re.search("full_key: (.+)", str(error))
    key = defining_key(unresolved, full_key[1]) if full_key else ""
    if missing := re.search("Interpolation key '(.+)' not found", text):
        reference = f"${{{missing[1]}}}"
        key = next((name for name, value in flat(unresolved) if isinstance(value, str) and reference in value), key)
        return f"{key} refers to the key {missing[1]}, and there is none"
    if inside := re.search("trying to access (.+): node `(.+)` is not a container", text):
        return f"{inside[2]} must have settings: {inside[1]} is needed"
    if name := re.search("Environment variable '(.+)' not found|Unsupported interpolation type (.+)", text):
        word = rf"\$\{{[^}}]*\b{re.escape(name[1] or name[2])}\b"
        found = (name for name, value in flat(unresolved) if isinstance(value, str) and re.search(word, value))
        key = next(found, key)
        text = text.removeprefix("KeyError raised while resolving interpolation: ").strip('"')
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"there is no key {key}, which is needed"
    return f"{key}: {text}" if key else text
