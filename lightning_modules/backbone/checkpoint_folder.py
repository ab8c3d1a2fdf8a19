"""Folders and files of weights: where they are, and what `export` wrote beside them. Imports no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.broken_files import read_json
from lightning_modules.files import BUNDLED

WEIGHTS = (  # in the order in which they are looked for
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
PICKLED = (".bin", ".pt", ".pth")
_NAME = r"[\w.-]+"  # pattern of an owner, a repository or a file on the hub


def resolve(checkpoint: str, advice: str | None = None) -> Path:
    """Find the folder of a checkpoint: a path, `bundled:NAME` for the package's own, or OWNER/NAME on the hub.

    A path to a file of weights stands for itself, as does OWNER/NAME/FILE on the hub. Raises FileNotFoundError if there
    are no weights; for the `advice` in it see `from_hub`.
    """
    name = checkpoint.removeprefix("bundled:")
    folder = BUNDLED / name if name != checkpoint else Path(checkpoint)
    if weights_file(folder).is_file() and (folder.is_dir() or folder.suffix in (*PICKLED, ".safetensors")):
        return folder
    if folder.suffix == ".ckpt" and folder.is_file():
        export = f"""`python train.py ... task=export "ckpt_path='{folder}'" export_dir=FOLDER`"""
        raise ValueError(f"{folder} is a checkpoint of training: {export} takes out the network, then name that folder")
    published = on_hub(checkpoint)
    if published is None:
        known = ", ".join(sorted(f"bundled:{path.parent.name}" for path in BUNDLED.glob("*/model.safetensors")))
        lacking = f"no model.safetensors in {folder}" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"checkpoint {checkpoint!r}: {lacking} (there are: {known})")
    name, file = published
    if file:
        return from_hub(name, [file], advice) / file
    return from_hub(name, ["*.safetensors", "*.json", "*.bin"], advice)


def on_hub(checkpoint: str) -> tuple[str, str] | None:
    """Split OWNER/NAME or OWNER/NAME/FILE into the first two and the file; None for what is here or is neither.

    A file of weights is told by how its name ends: other names with two slashes are paths.
    """
    endings = "|".join(map(re.escape, (*PICKLED, ".safetensors")))
    found = re.fullmatch(rf"({_NAME}/{_NAME})(?:/({_NAME}(?:{endings})))?", checkpoint)
    return (found[1], found[2] or "") if found and not Path(checkpoint).exists() else None


def from_hub(name: str, patterns: Sequence[str], advice: str | None = None, **options: Any) -> Path:
    """Fetch files of a model OWNER/NAME on the hub, if they are not here yet, and return their folder.

    Without network or model it raises FileNotFoundError, with the `advice` or how to set a checkpoint to a folder. The
    options are those of `snapshot_download`.
    """
    from huggingface_hub import snapshot_download  # takes as long as all else here

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except (OSError, ValueError) as error:
        advice = advice or f"run `hf download {name} --local-dir FOLDER`, then set the checkpoint to that folder"
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor to be had from the Hugging Face hub ({type(error).__name__}); where "
            f"there is network {advice}"
        ) from error


def weights_file(folder: Path) -> Path:
    """The file in a folder that holds the weights, or lists the files that do; the path itself if there is none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder)


def exported(folder: Path) -> dict[str, Any]:
    """The node that builds the network which `export` wrote to a folder; empty if something else did."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    module = config.get("module") if isinstance(config, dict) else None
    return module if isinstance(module, dict) else {}


def export_folders(folder: str, parts: Sequence[str]) -> dict[str, Path]:
    """Where `task=export` writes networks: into the folder, several into one of their name each."""
    return {name: Path(folder) / (name if len(parts) > 1 else "") for name in parts}


def refuse_other_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder holds weights, or a config of some, that are not an export of the same network."""
    there = [name for name in (*WEIGHTS, "config.json") if (folder / name).is_file()]
    stored = read_json(folder / "config.json") if "config.json" in there else None
    origin = {"checkpoint": None, "start": None}  # where weights came from decides nothing
    same = isinstance(stored, dict) and stored | origin == json.loads(json.dumps(config)) | origin
    if there and not same:
        raise ValueError(f"export_dir: {folder} holds {there[0]} of something else: name another folder")
