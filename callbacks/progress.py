"""One line about a run that trains: steps, loss, the newest val/geneval, and the time that is left."""

import math
import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

_SHOWN = {"train/loss": "loss", "val/geneval": "val/geneval"}  # metrics, and their names in the bar
_SECONDS = 10.0  # between two lines where the output is a file


class TrainingProgress(ProgressBar):
    """A bar over all optimizer steps of a run, in place of Lightning's one for each epoch.

    It counts what validation takes as well, so the time left is that until training ends. In a terminal the line is
    rewritten; in a file there is a new one every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._newest: dict[str, str] = {}  # not every validation measures
        self._enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the step from which training resumes."""
        steps = trainer.estimated_stepping_batches  # the least that `max_steps` and `max_epochs` allow
        self._bar = tqdm(
            total=int(steps) if 0 < steps < math.inf else None,
            initial=trainer.global_step,
            desc="Training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else _SECONDS,
            disable=not self._enabled,
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the optimizer steps that a batch has ended."""
        if self._bar is not None:
            self._show(trainer)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what validation has measured."""
        if self._bar is not None:
            self._show(trainer)
            self._bar.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last line as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line before anything is said of the error."""
        self.on_train_end(trainer, pl_module)

    def _show(self, trainer: Trainer) -> None:
        assert self._bar is not None
        values = {name: trainer.callback_metrics.get(metric) for metric, name in _SHOWN.items()}
        self._newest |= {n: f"{value:.3f}" for n, value in values.items() if value is not None and not value.isnan()}
        self._bar.set_postfix(self._newest, refresh=False)
