"""Training that diverges ends, and its weights are not loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.optim import ResumableModule
from lightning_modules.parm import PARMObjective


class Small(ResumableModule):
    """Its loss is as given, one a step."""

    def __init__(self, losses: list[float], outputs: int = 2, lr: float = 0.0) -> None:
        super().__init__()
        self.net, self.losses, self.lr = nn.Linear(2, outputs), losses, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).sum() * self.losses[batch_idx]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def fit(module: Small, folder: Path) -> Trainer:
    trainer = Trainer(max_steps=len(module.losses), accelerator="cpu", logger=False, default_root_dir=folder,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(torch.ones(8, 2)))  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_loss_that_is_not_finite_ends_training_and_names_the_step(tmp_path: Path, bad: float) -> None:
    module = Small([1, 2, bad, 1])
    with pytest.raises(ValueError, match=r"loss of step 3 is not finite; .*module\.optimizer\.lr"):
        fit(module, tmp_path)
    fit(Small([1, 2, 1]), tmp_path)


def test_a_last_step_that_breaks_the_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights are not finite: net\.weight \(and 1 more\) after step 1; .*lr"):
        fit(Small([1e30], lr=1e30), tmp_path)


def test_weights_that_are_not_finite_or_not_these_are_refused_in_one_sentence() -> None:
    module = Small([])
    state = module.state_dict()
    module.on_load_checkpoint({"state_dict": state})
    with pytest.raises(ValueError, match=r"^ckpt_path: weights are not finite: net\.bias: take a checkpoint from"):
        module.on_load_checkpoint({"state_dict": state | {"net.bias": torch.tensor([0, torch.nan])}})
    for wrong, said in (
        ({}, "net.weight is missing (and 1 more)"),
        (state | {"more": torch.ones(1)}, "more is not of this module"),
        (Small([], outputs=3).state_dict(), "net.weight has the shape [3, 2] instead of [2, 2] (and 1 more)"),
    ):
        with pytest.raises(ValueError, match=r"^ckpt_path: its weights are not those of this Small: ") as refused:
            module.load_state_dict(wrong)
        assert str(refused.value).endswith(said)


@pytest.mark.parametrize("name", ["finished", "feature_dropout"])
def test_fractions_lie_between_0_and_1(name: str) -> None:
    PARMObjective(**{name: 1.0})
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], not {value}"):
            PARMObjective(**{name: value})
