"""Runs train.py in processes of their own, forked from one that has imported it: imports take longer than small runs.

As a script it is the process that forks.
"""

import atexit
import gc
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

from tests.helpers.configs import CONF, composed
from tests.helpers.overrides import ROOT, SMALL_PARM, here

TRAIN = ROOT / "train.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Memory that is given back is asked for again at once.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
ROOMS = ("callbacks.", "datamodules.", "lightning_modules.")
# What these import when they are first used.
LATE = {"wandb.sdk.launch", "transformers.models.mask2former.modeling_mask2former", "torch.distributed.fsdp"}


class Start(NamedTuple):
    """A run: `python train.py OVERRIDES`, with more in its environment, or another script with its arguments."""

    overrides: Sequence[str]
    env: Mapping[str, str] = {}
    script: str = str(TRAIN)


@cache
def _forking() -> "subprocess.Popen[str]":
    line = [sys.executable, __file__]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV | KEEP_MEMORY)


def launch(
    overrides: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, timeout: int = 300
) -> "subprocess.CompletedProcess[str]":
    """What `python train.py OVERRIDES` does and says in a folder; SIGALRM ends it after `timeout` seconds."""
    (done,) = launch_together([Start(overrides, env or {})], folder, timeout)
    return done


def launch_together(
    starts: Sequence[Start], folder: Path, timeout: int = 300, meanwhile: Callable[[int], None] | None = None
) -> "list[subprocess.CompletedProcess[str]]":
    """The same of several runs at once; `meanwhile` is called with the number of the first one's process."""
    server = _forking()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as said:
        server.stdin.write(json.dumps([starts, str(folder), said, timeout]) + "\n")
        server.stdin.flush()
        pid = json.loads(server.stdout.readline())
        if meanwhile:
            meanwhile(pid)
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(
                start.overrides, code, *((Path(said) / f"{name}-{number}").read_text() for name in ("out", "err"))
            )
            for number, (start, code) in enumerate(zip(starts, codes, strict=True))
        ]


def command(tmp_path: Path, *overrides: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run train.py in a process of its own, from a temporary folder."""
    done = launch([*here(tmp_path), *overrides], tmp_path, env)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def scontrol(folder: Path) -> dict[str, str]:
    """An environment whose `scontrol` only writes down, in folder/scontrol, what it is asked to do."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/scontrol"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def _serve() -> None:
    gc.disable()  # what is imported stays
    _warm()
    gc.freeze()  # or each process would go through all that is imported
    gc.enable()
    for line in sys.stdin:
        starts, folder, said, timeout = json.loads(line)
        children = [_fork(Start(*start), folder, said, number, timeout) for number, start in enumerate(starts)]
        print(children[0], flush=True)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


def _warm() -> None:
    """Import what runs import, late ones too, and read what all of them read."""
    from hydra._internal.hydra import Hydra
    from PIL import Image

    import lightning_modules.tasks.run  # noqa: F401
    from lightning_modules.runs.signatures import signature

    targets = {name for path in CONF.rglob("*.yaml") for name in re.findall(r"_target_: ([\w.]+)", path.read_text())}
    for target in targets:
        signature(target)
    for module in {target.rpartition(".")[0] for target in targets if target.startswith(ROOMS)} | LATE:
        import_module(module)
    Image.init()
    composed(*SMALL_PARM)
    Hydra.get_mode = lambda *args, **names: None  # it composes everything for hydra.mode alone, which is set nowhere


def _fork(start: Start, folder: str, said: str, number: int, timeout: int) -> int:
    """Start a run in a process of its own; returns its number."""
    if child := os.fork():
        return child
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}/{name}-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.update(start.env)
    _train([start.script, *start.overrides], said, timeout)


def _train(line: Sequence[str], said: str, timeout: int) -> NoReturn:
    """Do in this process what `python LINE` would do in one of its own."""
    from lightning.pytorch.strategies.launchers import subprocess_script
    from lightning.pytorch.utilities import rank_zero_only
    from wandb.sdk.data_types._private import MEDIA_TMP

    if "LOCAL_RANK" not in os.environ:  # then Lightning may launch the second one
        subprocess_script.subprocess = SimpleNamespace(Popen=_Spare(said, timeout).begin)  # type: ignore[attr-defined]
    MEDIA_TMP.name = tempfile.mkdtemp(dir=said)  # what came with the import goes with the first process
    ranks = (os.environ.get(name) for name in ("LOCAL_RANK", "SLURM_PROCID"))
    rank_zero_only.rank = int(next(filter(None, ranks), 0))  # type: ignore[attr-defined]  # set at its import
    signal.alarm(timeout)
    sys.argv = list(line)
    code = _run(line[0])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # or it would take apart all that is imported, which takes longer than small runs


def _run(script: str) -> int:
    """Run a script; returns the code with which Python would end, and says on stderr what it would."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, int | None):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


class _Spare:
    """A process that is forked before a run begins, and becomes the one that Lightning would launch beside it."""

    def __init__(self, said: str, timeout: int) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        orders, self._orders = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(orders)
            return
        os.close(self._orders)
        with open(orders) as file:
            order = file.read()
        if not order:  # the run has ended without it
            os._exit(0)
        (_, *line), env, folder = json.loads(order)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        _train(line, said, timeout)

    def begin(self, command: Sequence[str], env: Mapping[str, str], cwd: str) -> "_Spare":
        """Stands in for subprocess.Popen."""
        with open(self._orders, "w") as file:
            json.dump([command, dict(env), cwd], file)
        return self

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("train.py", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    _serve()
