"""Folders to be written to are refused before anything is made in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_modules.runs.folders import refuse_unfit_folders


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["rollouts_dir=FOLDER/new"], "rollouts_dir: "),
        (["rollouts_dir=FOLDER/new", "task=rollout"], "rollouts_dir: "),
        (["rollouts_dir=FOLDER/empty"], "rollouts_dir: "),
        (["rollouts_dir=FOLDER"], "callbacks.checkpoint_"),  # all that is needed may be there
        (["rollouts_dir=FOLDER/new", "experiment=shapes_decoder"], "callbacks.checkpoint_"),
        (["rollouts_dir=FOLDER/new", "task=evaluate"], None),
        (["task=generate", "images=FOLDER/new"], "images: "),
        (["task=score", "images=FOLDER", "scores_dir=FOLDER/empty"], "scores_dir: "),
        (["task=score", "images=FOLDER", "scores_dir=FOLDER"], None),
        (["task=generate", "images=FOLDER/empty"], "images: "),
        (["task=generate", "images=FOLDER/made", "evaluator.images_per_prompt=1"], None),
        (["task=generate", "images=FOLDER/made", "evaluator.images_per_prompt=2"], "images: "),
        (["task=export", "ckpt_path=x", "export_dir=FOLDER"], "export_dir: "),
    ],
)
def test_without_permission_what_has_to_be_written_is_refused(
    overrides: list[str],
    refused: str | None,
    tmp_path: Path,
    compose_config: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config: Any = OmegaConf.to_container(
        compose_config(*(each.replace("FOLDER", str(tmp_path)) for each in overrides)), resolve=True
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "validation-0123456789abcdef0123").mkdir()
    for number in range(len(instantiate(config["geneval"]["test_prompts"]))):
        samples = tmp_path / "made" / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples / "0000.png").touch()
    (tmp_path / "made" / "provenance.json").write_text("{}")
    monkeypatch.setattr("lightning_modules.runs.folders.is_writable", lambda _: False)
    if refused is None:
        refuse_unfit_folders(config)
    else:
        with pytest.raises(ValueError, match=rf"^{refused}.*: there is no permission$"):
            refuse_unfit_folders(config)
