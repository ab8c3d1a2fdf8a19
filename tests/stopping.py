"""Callbacks for tests of runs that are stopped."""

import os
import signal
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Sends its process `signal` (a number) when `step` optimizer steps are done, before that step is saved."""

    def __init__(self, step: int, signal: int) -> None:
        self.step, self.signal = step, signal

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)


class FailOn(Callback):
    """Raises an error in the first batch of rank `rank`, or kills it there."""

    def __init__(self, rank: int, killed: bool = False) -> None:
        self.rank, self.killed = rank, killed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_rank == self.rank:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {self.rank} has run out of paint")
