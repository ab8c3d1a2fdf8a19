"""Callbacks for tests of runs that are stopped."""

import os
import signal
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Sends rank 0 `signal` (a number) when `step` optimizer steps are done, before that step is saved.

    With `killed` it has no time to end its step afterwards.
    """

    def __init__(self, step: int, signal: int, killed: bool = False) -> None:
        self.step, self.signal, self.killed = step, signal, killed

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)


class FailOn(Callback):
    """Raises an error in the first batch of rank `rank`, or kills it there; others may be `busy` for hours."""

    def __init__(self, rank: int, killed: bool, busy: bool) -> None:
        self.rank, self.killed, self.busy = rank, killed, busy

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_rank == self.rank:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {self.rank} has run out of paint")
        if self.busy:
            time.sleep(10_000)
