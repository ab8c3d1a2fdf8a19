"""The bar over all steps of a run."""

from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.progress import TrainingProgress


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"max_steps": 4}, "4/4"),
        ({"max_epochs": 2}, "6/6"),
        ({"max_steps": 20, "max_epochs": 1}, "3/3"),  # an epoch has fewer batches than steps are allowed
    ],
)
def test_the_bar_ends_where_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, int], wanted: str
) -> None:
    trainer = Trainer(
        **limits, limit_train_batches=3, limit_val_batches=0, callbacks=[TrainingProgress()], logger=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert f" {wanted} [" in capsys.readouterr().err
