"""Where W&B writes."""

import os
from pathlib import Path

import pytest

from lightning_modules.report import media


def test_each_run_of_a_process_has_wandb_write_to_its_folder_and_the_user_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", "mine")
    for name in ("one", "two"):  # of a --multirun
        media.wandb_logger(str(tmp_path / name), offline=True)
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / name / "wandb")
        assert os.environ["WANDB_CACHE_DIR"] == "mine"
