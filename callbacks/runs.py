"""What a run leaves and goes on from: its checkpoints and the config they were made with, its metrics, its W&B run."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from lightning_modules.broken_files import read_torch, refuse_damaged

_ROOT = Path(__file__).parents[1]
_ROOMS = ("callbacks", "datamodules", "lightning_modules")
# What a checkpoint that is not trained on has to share with the config: the networks.
_NETWORKS = ("_target_", "tokenizer", "decoder", "parm", "lora")
# What a run that goes on may change: where rollouts are kept, and what is only measured.
_FREE = ("folder", "num_workers", "validation", "test")
# What runs leave in their folders.
_LEFT = ("config.yaml", "metrics", "checkpoints", "results.jsonl", "geneval.json", "page.html", "sheets", "sheet.png",
         "compute.png", "checkpoints.csv", "checkpoints.png")  # fmt: skip

# What a checkpoint holds, some of it for those alone who train on.
_PARTS = {"state_dict": Mapping, "global_step": int, "pytorch-lightning_version": str, "hyper_parameters": Mapping,
          "callbacks": Mapping, "loops": Mapping, "optimizer_states": list, "lr_schedulers": list}  # fmt: skip
_TRAINING = ("callbacks", "loops", "optimizer_states", "lr_schedulers")
_found: dict[Path, bool] = {}  # folders that were there before this process came, and whether they were empty

LOCK = ".lock"  # in the folder of a run, held as long as it runs


def run_name(task: str, otherwise: str) -> str:
    """What a run is called that nobody named: by its task where that trains nothing and evaluates no checkpoint."""
    return task if task in ("generate", "score") else otherwise


def newest_checkpoint(folder: Path, thorough: bool = False) -> Path | None:
    """The checkpoint from which the run in `folder` goes on: of those that can be read the one with most steps.

    That is mostly last.ckpt. A run that was killed may have left one that last.ckpt does not point at yet;
    `hpc_ckpt_N.ckpt` is what Lightning leaves in a SLURM job. If none can be read, it is one that cannot.

    Args:
        folder: of the run.
        thorough: read all bytes, and print which checkpoints are passed over.
    """
    checkpoints = folder / "checkpoints"
    steps = [*checkpoints.glob("step-*.ckpt"), *checkpoints.glob("step=*.ckpt")]  # as they were called before
    found: dict[Path, int] = {}
    broken: dict[Path, Exception] = {}
    for paths in (steps, list(folder.glob("hpc_ckpt_*.ckpt")), [checkpoints / "last.ckpt"]):
        for path in sorted(filter(Path.is_file, paths), key=_number, reverse=True):
            try:
                if thorough:
                    refuse_damaged(path, "ckpt_path")
                found[path] = read_checkpoint(str(path))["global_step"]
                break
            except (ValueError, OSError) as error:
                broken.setdefault(path.resolve(), error)
    if not found:
        return next(iter(broken), None)
    for told in broken.values() if thorough else ():
        rank_zero_only(print)(f"Passed over: {str(told).removeprefix('ckpt_path: ')}", flush=True)
    return max(reversed(list(found)), key=found.__getitem__)


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
        metrics.rename(folder / f"metrics-{1 + max(map(_number, folder.glob('metrics-*')), default=0)}")
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


def remember_found(folder: Path) -> None:
    """Note a folder of the user's, and those in it, if they are there already: `forget_refused` leaves them."""
    if folder.is_dir():
        inside = list(folder.iterdir())
        _found[folder.resolve()] = not inside
        for path in inside:
            _found[path.resolve()] = False


def forget_refused(folder: Path) -> None:
    """Remove the folder of a run that was refused before it left anything but its config.

    Of a folder that was there before, only what the run has put into it goes, and nothing if it was not empty.
    """
    was_empty = _found.get(folder.resolve())
    with suppress(OSError):
        names = {path.name for path in folder.iterdir()}
        if names <= {".hydra", LOCK, "config.yaml"} and ("config.yaml" not in names or _has_config(folder)):
            for name in names if was_empty else ():
                shutil.rmtree(folder / name) if name == ".hydra" else (folder / name).unlink()
            if was_empty is None:
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
    _refuse_lacking(path, checkpoint, ("state_dict", "global_step"))
    for name, kind in _PARTS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            found = type(checkpoint[name]).__name__
            raise ValueError(f"ckpt_path: {path} is no checkpoint of training: its {name!r} is a {found}")
    return checkpoint


def _refuse_lacking(path: str, checkpoint: Any, names: Iterable[str], use: str = "") -> None:
    for name in names:
        if not isinstance(checkpoint, dict) or name not in checkpoint:
            raise ValueError(f"ckpt_path: {path} is no checkpoint of training{use}: it has no {name!r}")


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
    """Raise ValueError if a checkpoint is damaged or lacks something, or, naming the key, was made with another config.

    To go on training (`task: fit`) all that training depends on has to be the same, except for the Trainer's own
    arguments: Lightning would restore the optimizer's settings from the checkpoint, whatever the config says. For other
    tasks it is the networks, frozen ones included, since those are not in the checkpoint.
    """
    refuse_damaged(Path(path), "ckpt_path")
    checkpoint = read_checkpoint(path)
    _refuse_lacking(path, checkpoint, ["pytorch-lightning_version"])
    if config["task"] == "fit":
        _refuse_lacking(path, checkpoint, _TRAINING, " that task=fit can resume")
    stored = checkpoint.get("hyper_parameters", config)
    for key, old, new in _differences(_shared(stored, config["task"]), _shared(config, config["task"])):
        name = key.removeprefix("module.") if key.split(".")[1:2] and key.split(".")[1] in config else key
        raise ValueError(f"ckpt_path: {path} was made with {name}={old}, not {new}")


def _shared(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    module = config.get("module") or {}
    if task != "fit":
        return {"module": {key: module[key] for key in _NETWORKS if key in module}}
    data = {key: value for key, value in (config.get("data") or {}).items() if key not in _FREE}
    return {"module": module, "data": data, "seed": config.get("seed")}


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
