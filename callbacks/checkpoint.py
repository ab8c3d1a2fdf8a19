"""Checkpoints of runs that may be stopped at any time, and moved."""

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_modules.backbone.sampling import image_seed
from lightning_modules.files import whole
from lightning_modules.runs import slurm
from lightning_modules.runs.checkpoints import read_checkpoint, shown


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which knows its files when the folder of the run has moved.

    A run that resumes in another folder brings along the best weights of up to there, by the scores written in them.
    """

    _has_warned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless what is monitored was not measured yet since the run began or resumed."""
        measured = trainer.callback_metrics
        if self.monitor is None or self.monitor in measured:
            super().on_validation_end(trainer, pl_module)
        elif not (self._has_warned or trainer.sanity_checking or self.monitor == "val/geneval"):  # which is rare
            self._has_warned = True
            there = ", ".join(name for name in measured if name.startswith("val/"))
            said = f"no weights are kept as the best before it is; validation has measured: {there}"
            rank_zero_warn(f"monitor={self.monitor} is not measured yet, and {said}")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None or trainer.state.fn != TrainerFn.FITTING:
            return
        old, new = str(state["dirpath"]), str(self.dirpath)
        state["dirpath"] = self.dirpath
        for key in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[key] = _moved(state[key], old, new)
        if self.monitor is None:
            return
        scores: dict[str, Tensor] = {}
        if trainer.is_global_zero:
            places = [new, os.path.dirname(os.path.realpath(str(trainer.ckpt_path))), old]
            known = {_moved(path, old, new): score for path, score in state["best_k_models"].items()}
            found = {path: self._bring(path, score, places, checkpoint) for path, score in known.items()}
            scores = {path: score for path, score in found.items() if score is not None}
        state["best_k_models"] = scores = trainer.strategy.broadcast(scores)
        best, worst = (min, max) if self.mode == "min" else (max, min)
        state["best_model_path"] = best(scores, key=scores.__getitem__, default="")
        state["best_model_score"] = scores.get(state["best_model_path"])
        state["kth_best_model_path"] = worst(scores, key=scores.__getitem__, default="")
        state["kth_value"] = scores.get(state["kth_best_model_path"], self.kth_value)

    def _bring(self, path: str, score: Tensor, places: Sequence[str], resumed: Mapping[str, Any]) -> Tensor | None:
        """Copy best weights to `path` if they lie elsewhere; returns their score, or None if they are gone."""
        for source in filter(os.path.isfile, (_moved(path, places[0], place) for place in places)):
            try:
                saved = read_checkpoint(source)
            except ValueError as error:
                print(f"Passed over: {str(error).removeprefix('ckpt_path: ')}")
                continue
            if source != path:
                if saved["global_step"] > resumed["global_step"]:
                    continue
                with whole(Path(path)) as partial:
                    shutil.copyfile(source, partial)
            current: Tensor = saved["callbacks"].get(self.state_key, {}).get("current_score", score)
            return current
        name = os.path.basename(path)
        print(f"{name} ({self.monitor} {score:.4f}) is no more: the best weights from now on take its place")
        return None


def _moved(path: str, old: str, new: str) -> str:
    return str(Path(new) / Path(path).relative_to(old)) if path and Path(path).is_relative_to(old) else path


def best_checkpoint(trainer: Trainer) -> MovableCheckpoint:
    """Find the callback that keeps the best weights; raises ValueError if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, MovableCheckpoint) and callback.monitor is not None:
            return callback
    raise ValueError("test_ckpt_path=best needs callbacks.checkpoint_best, and here is none")


@rank_zero_only
def say_what_is_tested(path: str | None, otherwise: str) -> None:
    """Print which weights are tested: those of a checkpoint, or, where there is none, what `otherwise` says."""
    if path is not None:
        checkpoint = read_checkpoint(path)
        facts = [f"step {checkpoint['global_step']}"]
        for state in checkpoint.get("callbacks", {}).values():
            if state.get("monitor") and os.path.basename(state["best_model_path"]) == os.path.basename(path):
                facts.append(f"{state['monitor']} {float(state['current_score']):.3f}")
        otherwise = f"{shown(path)} ({', '.join(facts)})"
    print(f"Testing {otherwise}", flush=True)


class PreemptionCheckpoint(MovableCheckpoint):
    """Lightning's ModelCheckpoint, such that a run resumes exactly from wherever it was stopped.

    It saves when training ends, and on SIGTERM or Ctrl-C to any process, after the step that all are at; where a signal
    finds it between two steps, in another callback, at once. A second Ctrl-C ends the run unsaved. It does not save
    after an error, which may have left a step half done, nor between the last batch of an epoch and the first of the
    next, from where Lightning would resume in the wrong epoch when their lengths differ. Files are overwritten by name.
    A run that has come to its last step can be given more of them.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(save_on_exception=True, save_on_train_epoch_end=False, enable_version_counter=False, **kwargs)
        self._asked_to_stop = False
        self._in_batch = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["slurm_run"] = slurm.run_id()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning's own handler has processes meet wherever the signal finds each, where others meet for other things.
        signal.signal(signal.SIGTERM, partial(self._ask_to_stop, trainer))
        signal.signal(signal.SIGINT, self._interrupt)
        progress = trainer.fit_loop.epoch_progress.current
        if progress.completed == progress.ready:  # Lightning resumes any run with max_steps within an epoch
            trainer.fit_loop.epoch_loop.restarting = False

    def _ask_to_stop(self, trainer: Trainer, *_: Any) -> None:
        self._asked_to_stop = True
        step_is_done = self._in_batch and trainer.lightning_module._current_fx_name == "on_train_batch_end"
        resumable = step_is_done and not trainer.is_last_batch and not _gradients_wait(trainer)
        if resumable and not isinstance(trainer.strategy, FSDPStrategy):
            if trainer.is_global_zero:  # without the other processes, which may be anywhere; they meet if there is time
                names = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
                checkpoint = trainer._checkpoint_connector.dump_checkpoint()
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self.format_checkpoint_name(names))
            slurm.requeue.now()

    def _interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = "Stopping when this step or validation is saved (ckpt_path=auto resumes it); Ctrl-C again: at once"
        rank_zero_info(f"\n{said}")
        self._asked_to_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._in_batch = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._in_batch = False  # from here on it saves itself
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *batch)
            if trainer.global_step == trainer.max_steps:  # afterwards Lightning counts the epoch as completed
                self._save(trainer)
            if not _gradients_wait(trainer):
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


def _gradients_wait(trainer: Trainer) -> bool:
    """Say if those of the last batch wait for those of the next (`accumulate_grad_batches`); checkpoints hold none."""
    batches: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return batches % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch


class StopBetweenBatches(Callback):
    """Ends a test, or a run that makes or judges images, on SIGTERM: Lightning heeds it in training alone.

    Each process stops after its own batch: Lightning's own handler has them meet wherever the signal finds each.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGTERM, partial(self._ask_to_stop, trainer))

    on_predict_start = on_test_start

    def _ask_to_stop(self, trainer: Trainer, number: int, *_: Any) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)  # passes it on
        trainer._signal_connector.received_sigterm = True

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_test_batch_end(self, *batch: Any) -> None:
        self.on_predict_batch_end(*batch)


@dataclass(eq=False)
class StepSeed(Callback):
    """Makes what is drawn at random in a batch a function of its number, so that a resumed run draws the same."""

    seed: int

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(image_seed(self.seed, trainer.fit_loop.total_batch_idx))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        torch.manual_seed(batch[1])

    def on_test_batch_start(self, *batch: Any) -> None:
        self.on_validation_batch_start(*batch)
