"""What all LightningModules share: optimizer with warm-up and cosine decay, checkpoints without frozen parts."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.distributed.fsdp.fully_sharded_data_parallel import FSDP_PREFIX
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]  # of parameters, or of groups of them


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def warmup_cosine(module: "ResumableModule", optimizer: Optimizer, warmup_steps: int) -> OptimizerLRSchedulerConfig:
    """Lightning's optimizer dictionary: linear warm-up, then cosine decay to zero at the last step of the Trainer."""
    total = module.total_steps()

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class ResumableModule(LightningModule):
    """A LightningModule whose checkpoints leave out frozen parts, which have weight files of their own.

    Attributes:
        frozen_parts: names of sub-modules, dotted.
        trains_sharded: it can train where each process has a part of the weights.
    """

    frozen_parts: tuple[str, ...] = ()
    trains_sharded = True
    _epoch_steps: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_keep_frozen)

    def _is_frozen(self, key: str) -> bool:
        return key.startswith(tuple(f"{part}." for part in self.frozen_parts))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not self._is_frozen(key)}
        checkpoint["epoch_steps"] = self._epoch_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._epoch_steps = checkpoint["epoch_steps"]

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: for `task=rollout` the data module makes what is wanted when it is asked for batches to predict."""

    def total_steps(self) -> int:
        """Optimizer steps that the Trainer's `max_steps` and `max_epochs` allow.

        An epoch counts as the first one did, in a resumed run as well: its epochs may have other lengths by now, and a
        Trainer that is asked for their length before it is restored loses its place in the epoch.
        """
        trainer = self.trainer
        if trainer.max_epochs in (None, -1):
            return trainer.max_steps
        if self._epoch_steps is None:
            _ = trainer.estimated_stepping_batches  # makes the Trainer set up its loader
            self._epoch_steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        total = self._epoch_steps * trainer.max_epochs
        return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def _keep_frozen(module: ResumableModule, found: Any) -> None:
    """Strict loading misses no frozen part, which stays as it is (nor does FSDP, which has names of its own)."""
    found.missing_keys[:] = [key for key in found.missing_keys if not module._is_frozen(key.removeprefix(FSDP_PREFIX))]
