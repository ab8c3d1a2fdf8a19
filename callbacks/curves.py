"""TrainingCurves: a plot of how training went."""

import atexit
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.report.curves import curves_figure, read_metrics
from lightning_modules.report.media import log_curves
from lightning_modules.report.pictures import save_figure


class TrainingCurves(Callback):
    """Draws curves.png from what the run has logged to metrics.csv when training ends or is stopped.

    Args:
        folder: of the run.
        name: of the run, for the title.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = Path(folder), name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._draw(trainer):
            log_curves(trainer, self.folder / "curves.png")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is of a run that was stopped, at the very end: its checkpoint is more urgent."""
        stopped = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if stopped and trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            atexit.register(self._draw, trainer)

    def _draw(self, trainer: Trainer) -> bool:
        """Draw curves.png, if there is anything to draw."""
        for logger in trainer.loggers:
            logger.save()
        if (figure := curves_figure(read_metrics(self.folder), self.name)) is None:
            return False
        save_figure(figure, self.folder / "curves.png")
        return True
