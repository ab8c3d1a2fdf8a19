"""Wall time and memory of a function, for comparisons in one run."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
