"""Checkpoints that are broken, and folders that are the user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from callbacks.runs import checkpoint_to_resume
from lightning_modules.runs.checkpoints import (
    LOCK,
    changed_settings,
    forget_refused,
    keep_metrics,
    named_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    refuse_other_config,
    refuse_other_run,
    refuse_other_settings,
    remember_found,
)

WHOLE = {"state_dict": {"a": torch.ones(1000)}, "global_step": 1, "pytorch-lightning_version": "2.5.0", "callbacks": {},
         "loops": {}, "optimizer_states": [], "lr_schedulers": []}  # fmt: skip
CONFIG = {"task": "fit", "module": {"_target_": "a"}, "data": {}, "seed": 0}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in WHOLE.items() if key != name}


def flip(path: Path, at: bytes | float) -> None:
    """Change some bytes of a file, where others are or at a part of its length."""
    content = bytearray(path.read_bytes())
    place = content.index(at) if isinstance(at, bytes) else int(at * len(content))
    content[place : place + 8] = bytes(255 - byte for byte in content[place : place + 8])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "task", "said"),
    [
        (without("pytorch-lightning_version"), "export", "is no checkpoint of training: it has no 'pytorch-lightning_"),
        (without("optimizer_states"), "fit", "that task=fit can resume: it has no 'optimizer_states'"),
        (without("optimizer_states"), "evaluate", ""),
        (WHOLE | {"global_step": "many"}, "evaluate", "is no checkpoint of training: its 'global_step' is a str"),
        (WHOLE | {"hyper_parameters": "text"}, "fit", "is no checkpoint of training: its 'hyper_parameters' is a str"),
        (WHOLE | {"hyper_parameters": {"a": 1}}, "fit", "was made with module._target_=null, not a"),
        (WHOLE, "fit", ""),
        ([WHOLE], "fit", "is no checkpoint of training: it has no 'state_dict'"),
        (WHOLE | {"global_step": np.float64(3)}, "fit", "holds more than tensors and is not loaded"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(tmp_path: Path, content: Any, task: str, said: str) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    for refuse in (refuse_other_settings, refuse_other_config):  # without torch and with it
        if not said:
            refuse(str(path), CONFIG | {"task": task})
            continue
        with pytest.raises(ValueError, match=f"^ckpt_path: {path} ") as refused:
            refuse(str(path), CONFIG | {"task": task})
        assert said in str(refused.value)


@pytest.mark.parametrize("at", [0.5, 0.05, 0.1, b"data.pkl", b"state_dict", b"data/0", b"data/0FB"])
def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path: Path, at: bytes | float) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(WHOLE | {"state_dict": {"a": torch.ones(9000)}}, path)
    flip(path, at)
    with pytest.raises(ValueError, match=rf"^ckpt_path: {path} is broken \(.+\): copy or download it again$"):
        refuse_other_config(str(path), CONFIG)


def test_a_run_resumes_from_the_newest_checkpoint_that_can_be_read(
    tmp_path: Path, compose_config: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    compose_config()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2, 3, 4):
        torch.save(WHOLE | {"global_step": step}, folder / f"step-{step}.ckpt")
    (folder / "last.ckpt").symlink_to("step-4.ckpt")
    assert checkpoint_to_resume(tmp_path, "auto", "parm") == str(folder / "last.ckpt")
    assert "Passed over" not in capsys.readouterr().out
    (folder / "step-4.ckpt").write_bytes((folder / "step-4.ckpt").read_bytes()[:-100])
    assert newest_checkpoint(tmp_path) == folder / "step-3.ckpt" and not capsys.readouterr().out
    flip(folder / "step-3.ckpt", 0.5)
    assert checkpoint_to_resume(tmp_path, "auto", "parm") == str(folder / "step-2.ckpt")
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("Passed over: ") for line in said] == [True, True, False]
    assert "step-4.ckpt is cut off" in said[0] and "step-3.ckpt is broken" in said[1]
    for path in folder.glob("step-*"):
        path.write_bytes(b"")
    torn = newest_checkpoint(tmp_path)  # to be refused by its name
    assert torn is not None and torn.name == "step-4.ckpt"
    with pytest.raises(ValueError, match="is empty"):
        read_checkpoint(str(torn))


def test_metrics_are_put_aside_under_the_next_free_number(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"metrics-{number}").mkdir()
        (tmp_path / f"metrics-{number}" / "metrics.csv").touch()
    (tmp_path / "metrics-1" / "metrics.csv").unlink()
    (tmp_path / "metrics-1").rmdir()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics.csv").write_text("step\n")
    keep_metrics(tmp_path)
    assert (tmp_path / "metrics-11" / "metrics.csv").read_text() == "step\n"


def test_settings_that_a_resumed_run_changes_are_named(tmp_path: Path) -> None:
    config = {
        "rollouts_dir": "outputs/rollouts",
        "ckpt_path": None,
        "strategies": {"a": {"k": 8, "n": 2}},
        "task": "fit",
    }
    assert changed_settings(tmp_path, config) == []
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert changed_settings(tmp_path, config | {"rollouts_dir": "/disk", "ckpt_path": "auto"}) == []
    now = config | {"strategies": {"a": {"k": 16}}}
    assert changed_settings(tmp_path, now) == ["strategies.a.k=16 (8 until now)", "strategies.a.n=None (2 until now)"]


def test_a_refused_run_removes_only_what_it_has_made(tmp_path: Path) -> None:
    made, own, used, linked = (tmp_path / name for name in ("outputs/parm/made", "own", "used", "linked"))
    own.mkdir()
    (used / ".hydra").mkdir(parents=True)
    linked.symlink_to(tmp_path / "own", target_is_directory=True)
    (used / "loop").symlink_to(used / "loop")
    for folder in (made, own, used, linked):
        remember_found(folder)
    for folder in (made, own, used):
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    forget_refused(linked)
    for folder in (made, own, used, tmp_path / "nothing"):
        forget_refused(folder)
    assert not (tmp_path / "outputs").exists() and own.is_dir() and not list(own.iterdir())
    assert (used / ".hydra").is_dir() and linked.is_symlink()


def test_a_refused_resume_leaves_the_run_that_it_found(tmp_path: Path) -> None:
    found, made = tmp_path / "found", tmp_path / "made"
    (found / ".hydra").mkdir(parents=True)
    (found / LOCK).touch()
    (found / "config.yaml").write_text("rollouts_dir: rollouts\n")
    remember_found(tmp_path)  # `outputs/NAME`: the run has no name of its own yet
    (made / ".hydra").mkdir(parents=True)
    for folder in (found, made):
        forget_refused(folder)
    assert {path.name for path in found.iterdir()} == {".hydra", LOCK, "config.yaml"}
    assert not made.exists()


def test_the_folder_of_a_run_is_not_that_of_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there are no checkpoints in the folder \S+$"):
        named_checkpoints(str(tmp_path), "evaluate")
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=f"; there are in {tmp_path}/checkpoints$"):
        named_checkpoints(str(tmp_path), "evaluate")
    assert named_checkpoints(f"{tmp_path}/checkpoints", "evaluate") == [f"{tmp_path}/checkpoints/last.ckpt"]


def test_a_run_that_resumes_with_other_settings_is_refused_whatever_else_is_broken(tmp_path: Path) -> None:
    refuse_other_run(tmp_path, CONFIG)  # none yet
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.write_bytes(b"PK")
    refuse_other_run(tmp_path, CONFIG)  # an older one may do
    torch.save(WHOLE | {"hyper_parameters": CONFIG | {"seed": 1}}, last)
    with pytest.raises(ValueError, match=r"last\.ckpt was made with seed=1, not 0; ckpt_path=PATH"):
        refuse_other_run(tmp_path, CONFIG)


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for refuse in (refuse_other_settings, refuse_other_config):
        with pytest.raises(ValueError, match=r"^ckpt_path: \S+ holds weights alone, as safetensors"):
            refuse(str(tmp_path / "model.safetensors"), CONFIG)


def test_settings_in_a_checkpoint_are_read_without_running_anything(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save(WHOLE | {"hyper_parameters": {"a": 1}, "more": Code()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and is not loaded"):
        refuse_other_settings(str(tmp_path / "last.ckpt"), CONFIG | {"task": "fit"})
    assert not (tmp_path / "ran").exists()


def test_interpolations_that_were_typed_stay_texts(compose_config: Callable[..., DictConfig]) -> None:
    typed = "+strategies.mine={_target_: lightning_modules.decoding.sample.Sample, sampling: '${sampling}'}"
    run = instantiate(compose_config(typed).callbacks.geneval.run, _convert_="all")
    assert typed in run.overrides
