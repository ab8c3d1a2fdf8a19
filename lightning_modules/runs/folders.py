"""Checks of the folders that a run writes to: torch is not imported, nothing is created."""

import ast
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from lightning_modules.backbone.published import nodes
from lightning_modules.broken_files import read_json
from lightning_modules.cache_key import digest, key_of
from lightning_modules.files import PROVENANCE, refuse_other_provenance, refuse_unmarked
from lightning_modules.runs.signatures import locate


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
    if_new = {"rollouts_dir": stores, "scores_dir": task == "score", "images": task == "generate"}
    written = {"export_dir"} if task == "export" else {key for key in folders if task == "fit" and "dirpath" in key}
    for key, folder in folders.items():
        path = Path(str(folder)).absolute()
        there = next(each for each in (path, *path.parents) if each.exists())
        if not there.is_dir():
            raise ValueError(f"{key}: {folder}: it is below a file, not a folder")
        is_new = not path.exists() and if_new.get(key)  # what is there may be all that is needed
        if (key in written or is_new) and not os.access(there, os.W_OK):
            raise ValueError(f"{key}: {folder}: there is no permission")
    if task == "generate":
        try:
            refuse_unmarked(Path(config["images"]))
        except ValueError as error:
            raise ValueError(f"{error}; task=score judges what is there") from None
        _refuse_other_images(Path(config["images"]), config)


def _refuse_other_images(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a folder of images made with other settings, as far as they tell; weights may differ too."""
    stored = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else None
    if not isinstance(stored, dict):
        return
    prompts = instantiate({"geneval": {"test_prompts": config["generating"]["prompts"]}}, _convert_="all")
    rows = list(prompts["geneval"]["test_prompts"])
    evaluator = config["evaluator"]
    made_with = {"prompts": digest(rows), "samples": evaluator["images_per_prompt"], "seed": evaluator["seed"]}
    different = [name for name, value in made_with.items() if stored.get(name, value) != value]
    if _differs(stored.get("strategy"), config["strategies"][config["generating"]["strategy"]]):
        different.insert(0, "strategy")
    refuse_other_provenance(folder, different)


def _differs(key: Any, node: Any) -> bool:
    """Say if a setting is surely another one than that of a stored key (see `fields_key`)."""
    if not (isinstance(key, Mapping) and isinstance(node, Mapping)):
        plain = (str, int, float, type(None))
        return isinstance(key, plain) and isinstance(node, plain) and key != key_of(node)
    found = locate(str(node.get("_target_")))
    if found and isinstance(found.node, ast.ClassDef) and key.get("class") != f"{found.module}.{found.node.name}":
        return "class" in key
    return any(_differs(key[name], node[name]) for name in key.keys() & node.keys())
