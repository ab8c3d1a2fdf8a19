"""Checks of the folders that a run writes to: torch is not imported, nothing is left there."""

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from datamodules.geneval_prompts import sample_path
from lightning_modules.backbone.published import nodes
from lightning_modules.broken_files import read_json
from lightning_modules.cache_key import digest, key_of
from lightning_modules.files import PROVENANCE, is_writable, refuse_other_provenance, refuse_unmarked
from lightning_modules.runs.signatures import locate

_STORED = re.compile(r".+-[0-9a-f]{20}(\..+)?")  # names that `ArtifactCache` gives


def refuse_unfit_folders(config: Mapping[str, Any]) -> None:
    """Raise ValueError for folders to be written to that cannot be, or that hold something else."""
    task, data = config["task"], config.get("data") or {}
    made = {"generate": "images", "export": "export_dir"}.get(task)
    if made and Path(config[made]).is_file():
        raise ValueError(f"{made}: {config[made]} is a file, and a folder is made there: name another one")
    folders = {key: config[key] for key in ("rollouts_dir", "scores_dir", *([made] if made else []))}
    folders |= {
        f"callbacks.{key}.dirpath": node["dirpath"] for key, node in nodes(config["callbacks"]) if "dirpath" in node
    }
    stores = task in ("fit", "rollout") and data.get("folder") == config["rollouts_dir"]
    if_lacking = {"rollouts_dir": stores, "scores_dir": task == "score", "images": task == "generate"}
    written = {"export_dir"} if task == "export" else {key for key in folders if task == "fit" and "dirpath" in key}
    for key, folder in folders.items():
        path = Path(str(folder)).absolute()
        there = next(each for each in (path, *path.parents) if each.exists())
        if not there.is_dir():
            raise ValueError(f"{key}: {folder}: it is below a file, not a folder")
        lacking = key in written or (if_lacking.get(key) and _lacks_something(key, path, config))
        if lacking and not is_writable(there):
            raise ValueError(f"{key}: {folder}: there is no permission")
    if task == "generate":
        try:
            refuse_unmarked(Path(config["images"]))
        except ValueError as error:
            raise ValueError(f"{error}; task=score judges what is there") from None
        _refuse_other_images(Path(config["images"]), config)


def _lacks_something(key: str, folder: Path, config: Mapping[str, Any]) -> bool:
    """Say if a folder that is only read where all is there surely lacks something."""
    if key == "images":
        files = [sample_path(i, j) for i in range(len(_prompts(config))) for j in range(_samples(config))]
        return not all((folder / file).is_file() for file in files)
    return not any(_STORED.fullmatch(name) for name in (os.listdir(folder) if os.access(folder, os.R_OK) else ()))


def _refuse_other_images(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a folder of images made with other settings, as far as they tell; weights may differ too."""
    stored = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else None
    if not isinstance(stored, dict):
        return
    made_with = {"prompts": digest(_prompts(config)), "samples": _samples(config), "seed": config["evaluator"]["seed"]}
    different = [name for name, value in made_with.items() if stored.get(name, value) != value]
    if _differs(stored.get("strategy"), config["strategies"][config["generating"]["strategy"]]):
        different.insert(0, "strategy")
    refuse_other_provenance(folder, different)


def _prompts(config: Mapping[str, Any]) -> list[Any]:
    """The prompts of images to be made; errors name the key that they are usually set by."""
    prompts = instantiate({"geneval": {"test_prompts": config["generating"]["prompts"]}}, _convert_="all")
    return list(prompts["geneval"]["test_prompts"])


def _samples(config: Mapping[str, Any]) -> int:
    return int(config["evaluator"]["images_per_prompt"])


def _differs(key: Any, node: Any) -> bool:
    """Say if a setting is surely another one than that of a stored key (see `fields_key`)."""
    if not (isinstance(key, Mapping) and isinstance(node, Mapping)):
        plain = (str, int, float, type(None))
        return isinstance(key, plain) and isinstance(node, plain) and key != key_of(node)
    found = locate(str(node.get("_target_")))
    if found and isinstance(found.node, ast.ClassDef) and key.get("class") != f"{found.module}.{found.node.name}":
        return "class" in key
    return any(_differs(key[name], node[name]) for name in key.keys() & node.keys())
