"""Warm-up of masks: a mask-token decoder first learns to fill small gaps."""

from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer


@dataclass(eq=False)
class MaskWarmup(Callback):
    """Raises the largest fraction of tokens that training masks from `start` to 1, linearly.

    Where nearly all is masked, a small decoder learns for thousands of steps no more than how common each code is.
    """

    start: float  # fraction at the first step
    steps: int  # optimizer steps until all may be masked

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise ValueError(f"callbacks.mask_warmup.start must lie in (0, 1], not {self.start}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        fraction = self.start + (1 - self.start) * trainer.global_step / self.steps
        pl_module.decoder.max_mask_ratio = min(1.0, fraction)  # type: ignore[union-attr]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.decoder.max_mask_ratio = 1.0  # type: ignore[union-attr]
