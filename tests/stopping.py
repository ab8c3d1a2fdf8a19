"""A callback for tests of runs that are stopped: it sends its own process a signal."""

import os
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Sends `signal` (a number) on rank `rank` when `step` optimizer steps are done, before that step is saved."""

    def __init__(self, step: int, signal: int, rank: int = 0) -> None:
        self.step, self.signal, self.rank = step, signal, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signal)
