"""Where W&B writes, and what `wandb sync` finds again."""

import os
from pathlib import Path

import pytest
import wandb
from lightning import Trainer
from PIL import Image

from lightning_modules.report import media
from tests.helpers.results import make_evaluation, make_result
from tests.helpers.wandb_runs import artifacts, sent_files, table


def test_each_run_of_a_process_has_wandb_write_to_its_folder_and_the_user_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", "mine")
    for name in ("one", "two"):  # of a --multirun
        media.wandb_logger(str(tmp_path / name), offline=True)
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / name / "wandb")
        assert os.environ["WANDB_CACHE_DIR"] == "mine"


@pytest.mark.slow
def test_a_copy_of_a_run_has_all_that_wandb_sync_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = media.wandb_logger(str(tmp_path / "run"), offline=True)
    trainer = Trainer(accelerator="cpu", logger=logger, default_root_dir=tmp_path, enable_progress_bar=False)
    media.log_images(trainer, "val", make_evaluation({"sample": make_result([True, False, True, True])}))
    wandb.finish()
    (tmp_path / "run").rename(tmp_path / "copy")  # W&B's own process may still write to its log
    (path,) = tmp_path.glob("copy/wandb/offline-run-*/run-*.wandb")
    assert not artifacts(path)  # whose files have absolute paths
    rows = table(path, "val/images")
    assert [row["sample correct"] for row in rows] == [True, True]
    sent = sent_files(path)
    for row in rows:
        assert Image.open(row["sample"]).size == (64, 64) and row["sample"] in sent
    assert all(file.is_file() for file in sent if "media" in file.parts)
