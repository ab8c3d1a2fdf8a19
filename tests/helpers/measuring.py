"""Wall time and memory of a function, for comparisons in one run."""

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning import Callback, LightningModule, Trainer
from torch.profiler import profile


def seconds(function: Callable[[], object], rounds: int = 3) -> float:
    """Median wall time."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_mebibytes(function: Callable[[], object]) -> float:
    """Most memory that a function holds at a time of what it allocates itself."""
    with profile(profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    return float(np.cumsum(sizes).max()) / 2**20


class Measured(NamedTuple):
    """What a function took."""

    seconds: float  # of the processor, which other work on the machine hardly changes
    mebibytes: float  # most memory at a time, beside what there was before


def measured(function: Callable[[], object]) -> Measured:
    """Run a function of one thread in a process of its own, forked from this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        start = time.thread_time()
        function()
        spent, most = time.thread_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sender.send(Measured(spent, most / 2**10 - before / 2**20))

    process = context.Process(target=child)
    process.start()
    sender.close()  # so that a child that fails is an EOFError here
    found: Measured = receiver.recv()
    process.join()
    return found


class Clock(Callback):
    """Writes how long the Trainer was at work, from when all processes have met until all are done, seconds."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.barrier("clock starts")
        self.start = time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.barrier("clock stops")
        if trainer.is_global_zero:
            self.path.write_text(str(time.perf_counter() - self.start))
