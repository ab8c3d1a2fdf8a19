"""Files of a run, which it resumes from: checkpoints, the config they were made with, metrics, its W&B run."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightning_modules.broken_files import read_torch, read_without_tensors
from lightning_modules.files import remove, some_of
from lightning_modules.runs.messages import flat
from lightning_modules.runs.precision import native_precision
from lightning_modules.runs.processes import is_first

if TYPE_CHECKING:
    from lightning import LightningModule

# What a checkpoint that is not trained on has to share with the config: the networks.
_NETWORKS = ("_target_", "tokenizer", "decoder", "parm", "lora")
# What a resumed run may change: where rollouts are kept, and what is only measured.
_FREE = ("folder", "num_workers", "validation", "test")
_LOGS = (".err", ".log", ".out", ".txt")  # what a shell or SLURM writes of a run into its folder
# What a checkpoint holds; all of it is needed to resume training.
_PARTS = {"state_dict": Mapping, "global_step": int, "pytorch-lightning_version": str, "callbacks": Mapping,
          "loops": Mapping, "optimizer_states": list, "lr_schedulers": list}  # fmt: skip
_found: dict[Path, bool] = {}  # folders that were there before this process came, and whether they were empty
_missing: set[Path] = set()  # folders that were not

LOCK = ".lock"  # in the folder of a run, held as long as it runs


def run_name(task: str, otherwise: str) -> str:
    """Name a run that nobody named: by its task where that trains nothing and evaluates no checkpoint."""
    return task if task in ("generate", "score") else otherwise


def wandb_id(folder: str | None) -> str | None:
    """Find the id of the W&B run that logged into `folder` (None where there is none, as in `--cfg job`)."""
    runs = [] if folder is None else sorted(Path(folder).glob("wandb/*run-*-*"))
    return runs[-1].name.rpartition("-")[2] if runs else None


def folder_name(folder: str | None) -> str:
    """Return the last part of a path, which tells runs of one name apart; nothing where there is no folder."""
    return Path(folder or "").name


def typed_overrides() -> list[str]:
    """List what was typed, for the titles of pages."""
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)  # interpolations in them stay texts
    return typed


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("wandb_id", wandb_id, replace=True)
OmegaConf.register_new_resolver("native_precision", native_precision, replace=True)


def newest_checkpoint(folder: Path, thorough: bool = False) -> Path | None:
    """Find the checkpoint with most steps, of those in the folder of a run that can be read, or else one that cannot.

    Lightning leaves `hpc_ckpt_N.ckpt` in a SLURM job. `thorough` reads all bytes, and prints what is passed over.
    """
    found: dict[Path, int] = {}
    broken: dict[Path, Exception] = {}
    for paths in map(folder.glob, ("checkpoints/step[-=]*.ckpt", "hpc_ckpt_*.ckpt", "checkpoints/last.ckpt")):
        for path in sorted(filter(Path.is_file, paths), key=_number, reverse=True):
            try:
                found[path] = read_checkpoint(str(path), thorough)["global_step"]
                break
            except (ValueError, OSError) as error:
                broken.setdefault(path.resolve(), error)
    for cause in broken.values() if found and thorough and is_first() else ():
        print(f"Passed over: {str(cause).removeprefix('ckpt_path: ')}", flush=True)
    return max(reversed(found), key=found.__getitem__, default=next(iter(broken), None))


def _number(path: Path) -> int:
    return int(next(iter(re.findall(r"\d+", path.stem)), 0))


def quoted(path: Path | str) -> str:
    """Write a path as the value of a Hydra override; it may hold `=` and spaces."""
    return "'" + str(path).replace("'", r"\'") + "'"


def shown(path: Path | str) -> str:
    """Write a path as people read it: from here, if it is below."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def keep_metrics(folder: Path) -> None:
    """Put aside, as metrics-1 and so on, the metrics of a run that is resumed: CSVLogger would delete them."""
    metrics = folder / "metrics"
    if (metrics / "metrics.csv").is_file():
        metrics.rename(folder / f"metrics-{1 + max(map(_number, folder.glob('metrics-*')), default=0)}")
    else:
        remove(metrics)  # of a run that was killed before it wrote any


def refuse_foreign(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder for a run holds things of something else: neither logs nor named in the config."""
    if not folder.is_dir() or _has_config(folder):
        return
    named = [Path(value).absolute() for _, value in flat(config) if isinstance(value, str)]
    shown = [path for path in folder.iterdir() if path.name[0] != "." and path.suffix not in _LOGS]
    if found := [path for path in shown if not any(each.is_relative_to(path.absolute()) for each in named)]:
        names = some_of(sorted(path.name for path in found))
        raise ValueError(f"hydra.run.dir: {folder} holds {names} of something else: name another folder")


def changed_settings(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Name the settings that a run in a folder had until now and that a config changes, paths aside."""
    if not _has_config(folder):
        return []
    before, now = (
        dict(flat(each)) for each in (OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")), config)
    )
    plain = {key for each in (before, now) for key, value in each.items() if not isinstance(value, Mapping)}
    paths = {key for each in (before, now) for key, value in each.items() if "/" in str(value)}
    own = {"ckpt_path", "logger.wandb.id"}  # which differ in every command
    changed = sorted(key for key in plain - paths - own if before.get(key) != now.get(key))
    return [f"{key}={now.get(key)} ({before.get(key)} until now)" for key in changed]


def _has_config(folder: Path) -> bool:
    """Look for the first thing that a run writes into its folder."""
    config = folder / "config.yaml"
    return config.is_file() and re.search("^rollouts_dir:", config.read_text(errors="replace"), re.M) is not None


def remember_found(folder: Path) -> None:
    """Note what is there already, the folder, those in it and those around it: `forget_refused` leaves them.

    Where runs are in it, which one resumes is not known yet: what a run puts into its folder is noted of all.
    """
    folder = folder.absolute()
    _missing.update(each for each in (folder, *folder.parents) if not each.exists())
    if folder.is_dir():
        inside = [_real(path) for pattern in ("*", "*/.hydra", f"*/{LOCK}") for path in folder.glob(pattern)]
        _found.update({_real(folder): not inside} | dict.fromkeys(inside, False))


def forget_refused(folder: Path) -> None:
    """Remove the folder of a run that left nothing but its config; of one that was there, only what the run put in.

    So with the folder of a sweep.
    """
    was_empty = _found.get(_real(folder))
    with suppress(OSError):
        names = {path.name for path in folder.iterdir()}
        foreign = names - {".hydra", LOCK, "config.yaml", "multirun.yaml"} or (
            "config.yaml" in names and not _has_config(folder)
        )
        is_own = was_empty is not False and not foreign
        for name in names if is_own else names & {".hydra", LOCK}:
            if _real(folder / name) not in _found:
                remove(folder / name)
        if is_own and was_empty is None:
            folder.rmdir()
            for parent in filter(_missing.__contains__, folder.absolute().parents):
                parent.rmdir()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike `resolve`, it leaves links that lead to themselves


def read_checkpoint(path: str, thorough: bool = False, task: str | None = None) -> dict[str, Any]:
    """Read a checkpoint of training onto the CPU; for `thorough` see `read_torch`.

    Raises ValueError if it is none, holds more than plain data, or lacks what the task, if any, needs.
    """
    checkpoint: dict[str, Any] = read_torch(Path(path), "ckpt_path", thorough)
    _refuse_incomplete(path, checkpoint, task)
    return checkpoint


def _refuse_incomplete(path: str, checkpoint: Any, task: str | None) -> None:
    needed = list(_PARTS)[: 2 if task is None else None if task == "fit" else 3]
    for name, kind in {**_PARTS, "hyper_parameters": Mapping}.items():
        if not isinstance(checkpoint, dict) or name not in checkpoint:
            if name in needed:
                use = " that task=fit can resume" if name in needed[3:] else ""
                raise ValueError(f"ckpt_path: {path} is no checkpoint of training{use}: it has no {name!r}")
        elif not isinstance(checkpoint[name], kind):
            found = type(checkpoint[name]).__name__
            raise ValueError(f"ckpt_path: {path} is no checkpoint of training: its {name!r} is a {found}")


def named_checkpoints(ckpt_path: str, task: str) -> list[str]:
    """List the checkpoint of that path, or for `task: evaluate` all in a folder; FileNotFoundError if there is none."""
    path = Path(ckpt_path)
    if path.is_file():
        return [ckpt_path]
    if not path.is_dir():
        raise FileNotFoundError(f"ckpt_path: there is no file {ckpt_path}")
    if task != "evaluate":
        raise FileNotFoundError(f"ckpt_path: {ckpt_path} is a folder; only task=evaluate takes all checkpoints of one")
    if not (found := {str(each.resolve()) for each in path.glob("*.ckpt")}):  # each once: last.ckpt is a link
        inside = f"; there are in {path / 'checkpoints'}" if any(path.glob("checkpoints/*.ckpt")) else ""
        raise FileNotFoundError(f"ckpt_path: there are no checkpoints in the folder {ckpt_path}{inside}")
    return sorted(found)


def load_checkpoint(module: "LightningModule", path: str) -> None:
    """Load a checkpoint into a module outside of any Trainer."""
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def refuse_other_config(path: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint is damaged or lacks something, or, naming the key, was made with another config.

    To resume training, all that it depends on has to be the same: Lightning would restore the optimizer's settings from
    the checkpoint. For other tasks it is the networks, of which frozen ones are not in the checkpoint.
    """
    _refuse_other(path, read_checkpoint(path, True, config["task"]).get("hyper_parameters", config), config)


def refuse_other_settings(path: str, config: Mapping[str, Any]) -> None:
    """Do the same for what a checkpoint tells without torch, and leave all else that may be wrong with it to that."""
    checkpoint = read_without_tensors(Path(path), "ckpt_path")
    if checkpoint is not None:
        _refuse_incomplete(path, checkpoint, config["task"])
        _refuse_other(path, checkpoint.get("hyper_parameters", config), config)


def refuse_other_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Do the same for the run in a folder, which is about to resume; what is broken there is passed over later."""
    last, stored = folder / "checkpoints" / "last.ckpt", None
    with suppress(ValueError, OSError):
        stored = (read_without_tensors(last) or {}).get("hyper_parameters")
    if isinstance(stored, Mapping):
        try:
            _refuse_other(shown(last), stored, config)
        except ValueError as error:
            advice = "ckpt_path=PATH resumes an older run, and without ckpt_path a new one starts"
            raise ValueError(f"{error}; {advice}") from None


def _refuse_other(path: str, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    old, new = (dict(flat(_decisive(each, config["task"]))) for each in (stored, config))
    for key in {**new, **old}:
        before, now = old.get(key), new.get(key)
        if before != now and not (isinstance(before, Mapping) and isinstance(now, Mapping)):
            name = key.removeprefix("module.") if key.split(".")[1:] and key.split(".")[1] in config else key
            before, now = (
                "null" if each is None else "settings" if isinstance(each, Mapping) else each for each in (before, now)
            )
            raise ValueError(f"ckpt_path: {path} was made with {name}={before}, not {now}")


def _decisive(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    module = config.get("module") or {}
    if task != "fit":
        networks = {key: module[key] for key in _NETWORKS if key in module}
        networks["refit"] = "settings" if module.get("refit") else None  # with it PARM is trained as well
        return {"module": networks}
    data = {key: value for key, value in (config.get("data") or {}).items() if key not in _FREE}
    return {"module": module, "data": data, "seed": config.get("seed")}
