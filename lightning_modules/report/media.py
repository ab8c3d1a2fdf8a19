"""What W&B shows beside numbers: the table of images, and the page of a test."""

import os
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.report.results import EvaluationResult

_chosen: dict[str, str] = {}  # where this process has W&B write, by the variable that says so


def wandb_logger(
    save_dir: str, offline: bool = False, log_model: Literal["all"] | bool = False, **settings: Any
) -> WandbLogger:
    """Lightning's logger of a run in `save_dir`, where all that W&B writes lies, and not in HOME.

    What the user has set in the environment stays.
    """
    folder = Path(save_dir).absolute() / "wandb"
    for name, own in (("WANDB_DATA_DIR", folder), ("WANDB_CACHE_DIR", folder / "cache")):
        if os.environ.get(name) == _chosen.get(name):  # the user's own is neither unset nor that of the run before
            os.environ[name] = _chosen[name] = str(own)
    import wandb

    said = wandb.Settings(silent=True) if offline else wandb.Settings(quiet=True)  # online it says where the run is
    logger = WandbLogger(save_dir=save_dir, offline=offline, log_model=log_model, settings=said, **settings)
    logger._wandb_init.pop("anonymous", None)  # W&B warns of it, whatever its value
    return logger


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Those of the process that logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def log_images(trainer: Trainer, stage: str, evaluation: EvaluationResult) -> None:
    """Log a table to W&B, a row a prompt: of every strategy the image, its verdict with the reason, what judges say.

    W&B would keep the table as an artifact, whose files an offline run names by absolute paths: `wandb sync` of a copy
    would lose them. So the table and its images are files of the run, which lie beside its log and go where it goes.
    """
    import wandb

    key, step, results = f"{stage}/images", trainer.global_step, evaluation.strategies
    for logger in _wandb_loggers(trainer):
        rows = []
        for index in next(iter(results.values())).thumbnails:
            row: dict[str, Any] = {}
            for name, result in results.items():
                verdict, image = result.row_of(index), wandb.Image(result.thumbnails[index])
                image.bind_to_run(logger.experiment, key, step)
                row |= {"prompt": verdict["prompt"], name: image.to_json(logger.experiment)}
                row |= {f"{name} correct": verdict["correct"], f"{name} reason": verdict["reason"]}
                row |= {f"{name} {judge}": score for judge, score in result.traces[index].scores.items()}
            rows.append(row)
        table: Any = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        table.bind_to_run(logger.experiment, key, step)
        logger.log_metrics({key: table}, step=step)


def log_report(trainer: Trainer, folder: Path) -> None:
    """Log the page and the pictures of a test, which are in `folder`, to W&B."""
    import wandb

    for logger in _wandb_loggers(trainer):
        pictures: dict[str, Any] = {"test/page": wandb.Html(str(folder / "page.html"), inject=False)}
        for picture in (folder / "compute.png", folder / "sheets" / "side_by_side.png"):
            if picture.is_file():  # there are no sheets without prompts to show
                pictures[f"test/{picture.stem}"] = wandb.Image(str(picture))
        logger.log_metrics(pictures, step=trainer.global_step)


def log_curves(trainer: Trainer, path: Path) -> None:
    """Log the plot of the training curves to W&B."""
    import wandb

    for logger in _wandb_loggers(trainer):
        curves: dict[str, Any] = {"train/curves": wandb.Image(str(path))}
        logger.log_metrics(curves, step=trainer.global_step)
