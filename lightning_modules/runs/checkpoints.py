"""What a run leaves and goes on from: its checkpoints and the config they were made with, its metrics, its W&B run."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule
from omegaconf import OmegaConf

from lightning_modules.broken_files import read_torch

_ROOT = Path(__file__).parents[2]
_ROOMS = ("callbacks", "datamodules", "lightning_modules")
# What a checkpoint that is not trained on has to share with the config: the networks.
_NETWORKS = ("_target_", "tokenizer", "decoder", "parm", "lora")
# What a run that goes on may change: where rollouts are kept, and what is only measured.
_FREE = ("folder", "num_workers", "validation", "test")
# What runs leave in their folders.
_LEFT = ("config.yaml", "metrics", "checkpoints", "results.jsonl", "geneval.json", "page.html", "sheets", "sheet.png",
         "compute.png", "checkpoints.csv", "checkpoints.png")  # fmt: skip

LOCK = ".lock"  # in the folder of a run, held as long as it runs


def run_name(task: str, otherwise: str) -> str:
    """What a run is called that nobody named: by its task where that trains nothing and evaluates no checkpoint."""
    return task if task in ("generate", "score") else otherwise


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which the run in `folder` goes on: the one with most steps, mostly last.ckpt.

    A run that was killed may have left one that last.ckpt does not point at yet; `hpc_ckpt_N.ckpt` is what Lightning
    leaves in a SLURM job.
    """
    checkpoints = folder / "checkpoints"
    steps = [*checkpoints.glob("step-*.ckpt"), *checkpoints.glob("step=*.ckpt")]  # as they were called before
    newest = (max(paths, key=_number, default=None) for paths in (steps, folder.glob("hpc_ckpt_*.ckpt")))
    found = {
        path.resolve(): path for path in (*newest, checkpoints / "last.ckpt") if path is not None and path.is_file()
    }
    if len(found) < 2:
        return next(iter(found.values()), None)
    return max(reversed(list(found.values())), key=lambda path: int(read_checkpoint(str(path))["global_step"]))


def _number(path: Path) -> int:
    """The first number in a file's name."""
    return int(next(iter(re.findall(r"\d+", path.stem)), 0))


def quoted(path: Path | str) -> str:
    """A path as a value of a Hydra override, which may hold `=` and spaces."""
    return "'" + str(path).replace("'", r"\'") + "'"


def shown(path: Path | str) -> str:
    """A path as people read it: from here, if it is below."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def end_launched(launcher: Any, seconds: float) -> None:
    """Kill the processes that this one has launched and that do not end within some seconds of it.

    Lightning ends a job when one of these fails, but when this one does they may wait for it in vain.
    """
    for process in getattr(launcher, "procs", ()):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def wandb_id(folder: str | None) -> str | None:
    """The id of the W&B run that logged into `folder` (None where there is none, as in `--cfg job`), or None."""
    runs = [] if folder is None else sorted(Path(folder).glob("wandb/*run-*-*"))
    return runs[-1].name.rpartition("-")[2] if runs else None


def keep_metrics(folder: Path) -> None:
    """Put aside, as metrics-1 and so on, the metrics of a run that goes on: CSVLogger would delete them."""
    metrics = folder / "metrics"
    if (metrics / "metrics.csv").is_file():
        metrics.rename(folder / f"metrics-{1 + len(list(folder.glob('metrics-*')))}")
    else:
        shutil.rmtree(metrics, ignore_errors=True)  # of a run that was killed before it wrote any


def refuse_foreign(folder: Path) -> None:
    """Raise ValueError if a run in this folder would write over files that no run has left there."""
    found = [name for name in _LEFT if (folder / name).exists()]
    if found and not _has_config(folder):
        raise ValueError(f"hydra.run.dir: {folder} holds {', '.join(found)} of something else: name another folder")


def _has_config(folder: Path) -> bool:
    """Whether a run has written its config, the first thing that it writes, into a folder."""
    config = folder / "config.yaml"
    return config.is_file() and re.search("^rollouts_dir:", config.read_text(errors="replace"), re.M) is not None


def forget_refused(folder: Path) -> None:
    """Remove the folder of a run that was refused before it left anything but its config."""
    names = {path.name for path in folder.iterdir()}
    if names <= {".hydra", LOCK, "config.yaml"} and ("config.yaml" not in names or _has_config(folder)):
        shutil.rmtree(folder)


def code() -> str:
    """A short hash of the project's own code: what other code has made is not taken for what this would make."""
    digest = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (_ROOT / room).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint's content on the CPU; raises ValueError if it is none, or holds objects beside plain data."""
    checkpoint = read_torch(Path(path), "ckpt_path")
    for name in ("state_dict", "global_step"):
        if not isinstance(checkpoint, dict) or name not in checkpoint:
            raise ValueError(f"ckpt_path: {path} is no checkpoint of training: it has no {name!r}")
    return checkpoint


def named_checkpoints(ckpt_path: str, task: str) -> list[str]:
    """The checkpoint of that path, or for `task: evaluate` all of a folder, each once: last.ckpt is a link.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(ckpt_path)
    if path.is_dir() and task == "evaluate":
        found = sorted({str(each.resolve()) for each in path.glob("*.ckpt")})
        if not found:
            raise FileNotFoundError(f"ckpt_path: there are no checkpoints in the folder {ckpt_path}")
        return found
    if path.is_dir():
        raise FileNotFoundError(f"ckpt_path: {ckpt_path} is a folder; only task=evaluate takes all checkpoints of one")
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path: there is no file {ckpt_path}")
    return [ckpt_path]


def load_checkpoint(module: LightningModule, path: str) -> None:
    """Load a checkpoint into a module outside of any Trainer."""
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def refuse_other_config(path: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, if a checkpoint was made with another config than this one.

    To go on training (`task: fit`) all that training depends on has to be the same, except for the Trainer's own
    arguments: Lightning would restore the optimizer's settings from the checkpoint, whatever the config says. For other
    tasks it is the networks, frozen ones included, since those are not in the checkpoint.
    """
    stored = read_checkpoint(path).get("hyper_parameters", config)
    for key, old, new in _differences(_shared(stored, config["task"]), _shared(config, config["task"])):
        name = key.removeprefix("module.") if key.split(".")[1:2] and key.split(".")[1] in config else key
        raise ValueError(f"ckpt_path: {path} was made with {name}={old}, not {new}")


def _shared(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    if task != "fit":
        return {"module": {key: config["module"][key] for key in _NETWORKS if key in config["module"]}}
    data = {key: value for key, value in config["data"].items() if key not in _FREE}
    return {"module": config["module"], "data": data, "seed": config["seed"]}


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys under which two configs differ, with both values."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [(key, old, new)]
    names = [*old, *(name for name in new if name not in old)]
    return [
        difference
        for name in names
        for difference in _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    ]


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("wandb_id", wandb_id, replace=True)
