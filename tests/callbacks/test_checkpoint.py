"""Resumed runs take the batch that comes next, and know their best weights wherever they are."""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from callbacks.checkpoint import MovableCheckpoint, PreemptionCheckpoint, best_checkpoint
from lightning_modules.runs.checkpoints import read_checkpoint


class Diary(BoringModel):
    """Notes epoch, batch and step of what it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx, self.global_step))
        return super().training_step(batch, batch_idx)


def train(
    folder: Path,
    batches: int,
    *callbacks: Callback,
    model: Diary | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Diary:
    model = model or Diary()
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
def test_a_run_that_is_given_more_resumes_as_if_it_had_had_it(
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


class PreemptedIn(Callback):
    """The process is asked to stop in a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_run_stops_when_no_gradients_wait_for_those_of_the_next_batch(tmp_path: Path, batch: int) -> None:
    straight = train(tmp_path / "straight", 8, max_epochs=1, accumulate_grad_batches=2).seen
    model = Diary()
    with pytest.raises(SIGTERMException):
        train(tmp_path, 8, PreemptedIn(batch), model=model, max_epochs=1, accumulate_grad_batches=2)
    assert model.seen == straight[:4]
    resumed = train(tmp_path, 8, max_epochs=1, accumulate_grad_batches=2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == straight[4:]


class Scored(Diary):
    """Validates to a given score in each epoch; None is not measured."""

    def __init__(self, scores: Sequence[float | None]) -> None:
        super().__init__()
        self.scores = scores

    def on_validation_epoch_end(self) -> None:
        if (score := self.scores[self.current_epoch]) is not None:
            self.log("val/score", score)


def score(folder: Path, scores: Sequence[float | None], ckpt_path: Path | None = None) -> tuple[float, int]:
    """Train an epoch a score, in `folder`; returns the score of its best weights and the step they are of."""
    settings: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": False}  # as in conf/
    best = MovableCheckpoint(dirpath=folder, filename="best", monitor="val/score", mode="max", **settings)
    train(folder, 2, best, model=Scored(scores), max_epochs=len(scores), ckpt_path=ckpt_path)
    saved = read_checkpoint(str(folder / "best.ckpt"))
    assert best.best_model_path == str(folder / "best.ckpt")
    assert best.best_model_score == saved["callbacks"][best.state_key]["current_score"]
    return float(best.best_model_score), saved["global_step"]


def test_the_best_weights_stay_the_best_wherever_a_run_resumes(tmp_path: Path) -> None:
    old = tmp_path / "old"
    assert score(old, [0.1, 0.8, 0.3]) == (pytest.approx(0.8), 4)
    shutil.copytree(old, tmp_path / "moved", symlinks=True)
    assert score(tmp_path / "moved", [0, 0, 0, 0.5], tmp_path / "moved" / "last.ckpt") == (pytest.approx(0.8), 4)
    assert [path.name for path in (tmp_path / "moved").glob("step*")] == ["step=8.ckpt"]  # what was newest is removed
    assert score(tmp_path / "new", [0, 0, 0, 0.5], old / "last.ckpt") == (pytest.approx(0.8), 4)
    assert score(tmp_path / "new", [0, 0, 0, 0, 0.9], tmp_path / "new" / "last.ckpt") == (pytest.approx(0.9), 10)
    shutil.copy(old / "last.ckpt", tmp_path / "alone.ckpt")  # the best ones are where they were
    assert score(tmp_path / "newer", [0, 0, 0], tmp_path / "alone.ckpt") == (pytest.approx(0.8), 4)
    assert read_checkpoint(str(old / "best.ckpt"))["global_step"] == 4


def test_it_warns_of_a_name_that_validation_has_not_measured(tmp_path: Path) -> None:
    best = MovableCheckpoint(dirpath=tmp_path, filename="best", monitor="val/result", save_on_train_epoch_end=False)
    with pytest.warns(UserWarning, match="monitor=val/result is not measured yet, .* has measured: val/score$"):
        train(tmp_path, 2, best, model=Scored([0.1]), max_epochs=1)


def test_the_best_weights_are_of_an_epoch_that_was_measured(tmp_path: Path) -> None:
    """A run resumes before an epoch in which nothing is measured."""
    assert score(tmp_path, [None, 0.5]) == (pytest.approx(0.5), 4)
    resumed = score(tmp_path, [0, 0, None, 0.9, None], tmp_path / "last.ckpt")
    assert resumed == (pytest.approx(0.9), 8)


def test_best_weights_that_are_gone_or_of_later_steps_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    score(old, [0.1, 0.7])
    shutil.copy(old / "last.ckpt", old / "first.ckpt")
    score(old, [0, 0, 0.9], old / "last.ckpt")
    assert score(tmp_path / "new", [0, 0, 0.2], old / "first.ckpt") == (pytest.approx(0.2), 6)
    assert (
        "best.ckpt (val/score 0.7000) is no more: the best weights from now on take its place"
        in capsys.readouterr().out
    )
    assert score(old, [0, 0, 0.8], old / "first.ckpt") == (pytest.approx(0.9), 6)  # no worse one overwrites it
    (old / "best.ckpt").write_bytes((old / "best.ckpt").read_bytes()[:-100])
    assert score(tmp_path / "newer", [0, 0, 0.2], old / "first.ckpt") == (pytest.approx(0.2), 6)
    assert f"Passed over: {old}/best.ckpt is cut off" in capsys.readouterr().out
    (old / "best.ckpt").unlink()
    assert score(old, [0, 0, 0, 0.1], old / "last.ckpt") == (pytest.approx(0.1), 8)


def test_the_best_weights_need_a_callback_that_keeps_them() -> None:
    with pytest.raises(ValueError, match=r"test_ckpt_path=best needs callbacks\.checkpoint_best"):
        best_checkpoint(Trainer(logger=False, enable_progress_bar=False, accelerator="cpu"))
