"""TrainingCurves: a plot of how training went."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from lightning_modules.report.curves import curves_figure, read_metrics
from lightning_modules.report.media import log_curves
from lightning_modules.report.pictures import save_figure


class TrainingCurves(Callback):
    """Draws curves.png from what the run has logged to metrics.csv when training ends.

    Args:
        folder: of the run.
        name: of the run, for the title.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = Path(folder), name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        if (figure := curves_figure(read_metrics(self.folder), self.name)) is not None:
            save_figure(figure, self.folder / "curves.png")
            log_curves(trainer, self.folder / "curves.png")
