"""Runs train.py in processes of their own, forked from one that has imported it: imports take longer than small runs.

As a script it is the process that forks.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.overrides import ROOT, here

TRAIN = ROOT / "train.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@cache
def _forking() -> "subprocess.Popen[str]":
    line = [sys.executable, __file__]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)


def launch(
    overrides: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, timeout: int = 300
) -> "subprocess.CompletedProcess[str]":
    """What `python train.py OVERRIDES` does and says in a folder; SIGALRM ends it after `timeout` seconds."""
    (done,) = launch_together([(overrides, env or {})], folder, timeout)
    return done


def launch_together(
    runs: Sequence[tuple[Sequence[str], Mapping[str, str]]], folder: Path, timeout: int = 300
) -> "list[subprocess.CompletedProcess[str]]":
    """The same of several runs at once, each with its overrides and its environment."""
    server = _forking()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as said:
        orders = []
        for number, (overrides, env) in enumerate(runs):
            out, err = (str(Path(said) / f"{name}-{number}") for name in ("out", "err"))
            orders.append(([str(TRAIN), *overrides], str(folder), dict(env), out, err, timeout))
        server.stdin.write(json.dumps(orders) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(line, code, Path(out).read_text(), Path(err).read_text())
            for code, (line, _, _, out, err, _) in zip(codes, orders, strict=True)
        ]


def _fork(order: Sequence[Any]) -> int:
    """Start a run in a process of its own; returns its number."""
    from lightning.pytorch.utilities import rank_zero_only
    from wandb.sdk.data_types._private import MEDIA_TMP

    line, folder, env, out, err, timeout = order
    if child := os.fork():
        return child
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.makedirs(MEDIA_TMP.name, exist_ok=True)  # the process before has removed what came with the import
    signal.alarm(timeout)
    os.chdir(folder)
    os.environ.update(env)
    rank_zero_only.rank = int(os.environ.get("SLURM_PROCID", 0))  # type: ignore[attr-defined]  # set at its import
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")
    sys.exit()


def arguments(tmp_path: Path, *overrides: str) -> list[str]:
    """The command line of train.py that leaves everything in a temporary folder."""
    return [sys.executable, str(TRAIN), *here(tmp_path), *overrides]


def command(tmp_path: Path, *overrides: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run train.py in a process of its own, from a temporary folder."""
    done = launch([*here(tmp_path), *overrides], tmp_path, env)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def scontrol(folder: Path) -> dict[str, str]:
    """An environment whose `scontrol` only writes down, in folder/scontrol, what it is asked to do."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/scontrol"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def _serve() -> None:
    import train  # noqa: F401

    gc.freeze()  # or each process would go through all that is imported, to end
    for orders in sys.stdin:
        children = [_fork(order) for order in json.loads(orders)]
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


if __name__ == "__main__":
    _serve()
