"""Runs that were stopped, or had come to their end, go on with the batch that comes next."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from callbacks.checkpoint import PreemptionCheckpoint


class Diary(BoringModel):
    """Notes epoch, batch and step of what it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx, self.global_step))
        return super().training_step(batch, batch_idx)


def train(folder: Path, batches: int, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Diary:
    model = Diary()
    checkpoint = PreemptionCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=50, save_last="link", save_top_k=1
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[checkpoint, *callbacks], **quiet, **settings)
    loaders = DataLoader(RandomDataset(32, batches)), DataLoader(RandomDataset(32, 1))
    trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=False)
    return model


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
@pytest.mark.parametrize(("limit", "first", "more"), [("max_steps", 4, 7), ("max_epochs", 2, 4)])
def test_a_run_that_is_given_more_goes_on_as_if_it_had_had_it(
    tmp_path: Path, batches: int, limit: str, first: int, more: int
) -> None:
    straight = train(tmp_path / "straight", batches, **{limit: more}).seen
    seen = train(tmp_path / "two", batches, **{limit: first}).seen
    seen += train(tmp_path / "two", batches, **{limit: more}, ckpt_path=tmp_path / "two" / "last.ckpt").seen
    assert seen == straight


class Preempted(Callback):
    """The process is asked to stop in the last validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_asked_to_stop_in_its_last_validation_does_so_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        train(tmp_path, 2, Preempted(), max_epochs=2)
    assert train(tmp_path, 2, max_epochs=3, ckpt_path=tmp_path / "last.ckpt").seen == [(2, 0, 4), (2, 1, 5)]
