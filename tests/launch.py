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

TRAIN = Path(__file__).parent.parent / "train.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAIN.parent)}


@cache
def _forking() -> "subprocess.Popen[str]":
    line = [sys.executable, __file__]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)


def launch(
    overrides: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, timeout: int = 300
) -> "subprocess.CompletedProcess[str]":
    """What `python train.py OVERRIDES` does and says in a folder; SIGALRM ends it after `timeout` seconds."""
    server, line = _forking(), [str(TRAIN), *overrides]
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as said:
        out, err = (Path(said) / name for name in ("out", "err"))
        order = [line, str(folder), dict(env or {}), str(out), str(err), timeout]
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(line, code, out.read_text(), err.read_text())


def scontrol(folder: Path) -> dict[str, str]:
    """An environment whose `scontrol` only writes down, in folder/scontrol, what it is asked to do."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/scontrol"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def _serve() -> None:
    from wandb.sdk.data_types._private import MEDIA_TMP

    import train  # noqa: F401

    gc.freeze()  # or each process would go through all that is imported, to end
    for order in sys.stdin:
        line, folder, env, out, err, timeout = json.loads(order)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.makedirs(MEDIA_TMP.name, exist_ok=True)  # the process before has removed what came with the import
        signal.alarm(timeout)
        os.chdir(folder)
        os.environ.update(env)
        sys.argv = line
        runpy.run_path(line[0], run_name="__main__")
        sys.exit()


if __name__ == "__main__":
    _serve()
