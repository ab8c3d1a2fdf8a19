"""The folder of a run: chosen once for all of its processes, and its own as long as it runs."""

import fcntl
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from lightning_modules.runs import slurm
from lightning_modules.runs.checkpoints import (
    LOCK,
    forget_refused,
    newest_checkpoint,
    quoted,
    read_checkpoint,
    refuse_foreign,
    remember_found,
    shown,
)
from lightning_modules.runs.checks import refuse_wrong_texts
from lightning_modules.runs.messages import sentence
from lightning_modules.runs.processes import is_first

_ENDED = ".ended"  # left by a run under SLURM that has come to its end


class RunFolder(Callback):
    """Chooses the folder when a run starts, unless `hydra.run.dir` (or `hydra.sweep.dir`) names it. Hydra calls it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _open(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _open(config, "sweep")
        with read_write(config.hydra):  # jobs are composed anew, from overrides
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(config.hydra.sweep.dir)}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        slurm.requeue.listen()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.COMPLETED and is_first():
            slurm.requeue.forget()
            _note_end(config.hydra.runtime.output_dir)
            if config.task in ("fit", "evaluate", "score", "pipeline"):  # which leave their results there
                tested = config.test_ckpt_path or "last"
                print(last_line(Path(config.hydra.runtime.output_dir), config.hydra.overrides.task, tested))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _note_end(config.hydra.sweep.dir)


def last_line(folder: Path, overrides: Sequence[str], tested: str) -> str:
    """Say where the results of a run are, and how the weights that were `tested` are evaluated again."""
    line = f"Results in {shown(folder)}"
    if (folder / "page.html").is_file():
        line += "; page.html shows the images"
    if (checkpoint := folder / "checkpoints" / f"{tested}.ckpt").is_file():
        last = {override.partition("=")[0]: override for override in overrides}  # which counts, of several
        kept = [override for key, override in last.items() if key not in ("task", "ckpt_path")]
        again = shlex.join([*kept, "task=evaluate", f"ckpt_path={shown(checkpoint)}"])
        line += f"; to evaluate again: python train.py {again}"
    return line


def run_folder(parent: str, task: str, ckpt_path: str | None) -> str:
    """Choose a folder in `parent` for this run, named after the time, or after the SLURM job, which finds it again.

    `ckpt_path=auto` resumes in the folder of the newest checkpoint where no run is at work.
    """
    resuming = ckpt_path == "auto" and task == "fit"
    if run := slurm.run_id():
        for folder in _numbered(f"{parent}/slurm-{run}"):
            if resuming and not folder.exists() and (found := _newest_run(parent)):
                return found
            if not _is_over(folder) and (_has_several_tasks() or try_to_hold(folder)):
                return str(folder)
    if resuming and (found := _newest_run(parent)):
        return found
    for folder in _numbered(f"{parent}/{datetime.now():%Y-%m-%d_%H-%M-%S}"):
        with suppress(FileExistsError):  # of several runs that start together, one makes it
            folder.mkdir(parents=True)
            break
    return str(folder)


def checkpoint_to_resume(folder: Path, ckpt_path: str | None, name: str) -> str | None:
    """Say where the training of a run in `folder` starts: with `auto` at the newest checkpoint there.

    So it does, whatever `ckpt_path` says, if the same command of the same SLURM job saved that before it was requeued.
    """
    say = partial(print, flush=True) if is_first() else str
    found, run = newest_checkpoint(folder, thorough=True), slurm.run_id()
    is_own = False
    if found and run and not _is_over(folder):  # Lightning's own checkpoints do not say whose they are
        is_own = found.name.startswith("hpc_ckpt_") or read_checkpoint(str(found)).get("slurm_run") == run
    if found and (ckpt_path == "auto" or is_own):
        say(f"The run resumes from {shown(found)}")
        return str(found)
    if ckpt_path != "auto":
        return ckpt_path
    say(f"ckpt_path=auto: there is no checkpoint of a run {name!r} yet, so a new one starts")
    return None


def try_to_hold(folder: Path) -> bool:
    """Make the folder this process's own until it ends, however it does; returns False if it is another one's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, it is not inherited by forked workers
    except (BlockingIOError, PermissionError):
        os.close(lock)
        return False
    except OSError:  # a disk without locks: there one has to take care
        pass
    return True


def _open(config: DictConfig, kind: Literal["run", "sweep"]) -> None:
    """Settle on the folder of a run or of a sweep, which is one run's at a time."""
    HydraConfig.instance().set_config(config)  # names may refer to it
    held = False
    try:
        refuse_wrong_texts(OmegaConf.to_container(config))  # type: ignore[arg-type]
        parent, resumed = (f"outputs/{config.name}", config.ckpt_path) if kind == "run" else ("multirun", None)
        remember_found(Path(config.hydra[kind].dir or parent))
        if not config.hydra[kind].dir:
            with read_write(config.hydra):
                config.hydra[kind].dir = _agreed(lambda: run_folder(parent, config.task, resumed))
        folder = config.hydra[kind].dir
        # Several processes may work on a pipeline, each of whose jobs is a run.
        if config.task != "pipeline" and is_first():
            if not (held := try_to_hold(Path(folder))):
                said = f"give this one its own by hydra.{kind}.dir=FOLDER"
                raise ValueError(f"another run is at work in {folder}; {said}")
            if kind == "run":
                refuse_foreign(Path(folder), OmegaConf.to_container(config))  # type: ignore[arg-type]
    except Exception as error:  # Hydra would only warn of it
        unresolved: Any = OmegaConf.to_container(config)
        if held:
            forget_refused(Path(folder))
        sys.exit(f"Error: {sentence(error, unresolved | {'hydra': {kind: {'dir': config.hydra[kind].dir}}})}")


def _agreed(choose: Callable[[], str]) -> str:
    """Return what the first process of a torchrun has chosen; elsewhere the command line tells the other processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return choose()
    from torch.distributed import TCPStore  # takes seconds to import

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = "image-cot/run_folder"
    if is_first() and not store.check([key]):  # it is there when torchrun has started them again
        store.set(key, choose())
    return store.get(key).decode()


def _numbered(path: str) -> Iterator[Path]:
    """Yield `path`, `path`-1, `path`-2, ..."""
    return (Path(f"{path}-{number}" if number else path) for number in count())


def _newest_run(parent: str) -> str | None:
    """Return the folder in `parent` with the newest checkpoint, of those where no run is at work."""
    found = {folder: path for folder in Path(parent).glob("*") if (path := newest_checkpoint(folder))}
    newest = sorted(found, key=lambda folder: found[folder].stat().st_mtime_ns, reverse=True)
    return next((str(folder) for folder in newest if _has_several_tasks() or try_to_hold(folder)), None)


def _has_several_tasks() -> bool:
    """Say if other tasks have to come to the same folder, each on its own: they do not look who is in it."""
    return slurm.job_id() is not None and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _is_over(folder: Path) -> bool:
    """Say if the run in `folder` has come to its end, in this start of its SLURM job."""
    return (folder / _ENDED).exists() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0


def _note_end(folder: str) -> None:
    if slurm.job_id() is not None and is_first():
        (Path(folder) / _ENDED).touch()
