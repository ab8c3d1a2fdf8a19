"""Checkpoints of runs that may be stopped at any time."""

import signal
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.backbone.sampling import image_seed


class PreemptionCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, such that a run goes on exactly from wherever it was stopped.

    It saves when training ends, and on SIGTERM or Ctrl-C to any process of the run, after the step that all are at (a
    second Ctrl-C ends it at once, unsaved); but not after an error, which may have left a step half done, and not
    between the last batch of an epoch and the first of the next, from where Lightning would go on in the wrong epoch
    when their lengths differ; validation there saves as part of its epoch. Files are overwritten by name: a resumed run
    has one last.ckpt. A run that has come to its last step can be given more of them.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(save_on_exception=True, save_on_train_epoch_end=False, enable_version_counter=False, **kwargs)
        self._asked_to_stop = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning's own handler has processes meet wherever the signal finds each, where others meet for other things.
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        signal.signal(signal.SIGINT, self._interrupt)
        progress = trainer.fit_loop.epoch_progress.current
        if progress.completed == progress.ready:  # Lightning takes any run with max_steps to go on within an epoch
            trainer.fit_loop.epoch_loop.restarting = False

    def _ask_to_stop(self, *_: Any) -> None:
        self._asked_to_stop = True

    def _interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        rank_zero_info(
            "\nStopping when this step or validation is saved (ckpt_path=auto goes on); Ctrl-C again: at once"
        )
        self._asked_to_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *batch)
            if trainer.global_step == trainer.max_steps:  # afterwards Lightning counts the epoch as completed
                self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._stop_if_asked(trainer)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False):
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and not trainer.is_last_batch:
            super().on_exception(trainer, pl_module, exception)


class StopBetweenBatches(Callback):
    """Ends a run that makes or judges images on SIGTERM: Lightning heeds it in training alone."""

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.received_sigterm:
            raise SIGTERMException


class StepSeed(Callback):
    """Makes what is drawn at random in a batch a function of its number, so that a resumed run draws the same.

    Args:
        seed: of the training batches.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(image_seed(self.seed, trainer.fit_loop.total_batch_idx))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        torch.manual_seed(batch_idx)

    on_test_batch_start = on_validation_batch_start
