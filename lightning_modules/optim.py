"""What all LightningModules share: optimizer with warm-up and cosine decay, checkpoints without frozen parts."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]  # of parameters, or of groups of them


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def warmup_cosine(module: LightningModule, optimizer: Optimizer, warmup_steps: int) -> OptimizerLRSchedulerConfig:
    """Lightning's optimizer dictionary: linear warm-up, then cosine decay to zero at the last step of the Trainer."""
    total = int(module.trainer.estimated_stepping_batches)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class FrozenPartsMixin:
    """Keeps frozen parts, which have weight files of their own, out of a LightningModule's checkpoints.

    Attributes:
        frozen_parts: names of sub-modules, dotted.
    """

    frozen_parts: tuple[str, ...] = ()

    def _is_frozen(self, key: str) -> bool:
        return key.startswith(tuple(f"{part}." for part in self.frozen_parts))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not self._is_frozen(key)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen parts back as they are now, so that loading can stay strict."""
        current = self.state_dict()  # type: ignore[attr-defined]
        checkpoint["state_dict"] |= {key: value for key, value in current.items() if self._is_frozen(key)}
