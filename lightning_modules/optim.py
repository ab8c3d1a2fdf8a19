"""The base of all LightningModules: warm-up and cosine decay, checkpoints without frozen parts."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp.fully_sharded_data_parallel import FSDP_PREFIX
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.ranks import is_distributed

_DIVERGED = "training diverges: lower module.optimizer.lr, or look at trainer.gradient_clip_val and trainer.precision"

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]  # of parameters, or of groups of them


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class ResumableModule(LightningModule):
    """A LightningModule whose checkpoints leave out frozen parts, which have weight files of their own.

    Training ends with ValueError, on all ranks, at the first loss that is not finite; weights that are not finite are
    neither loaded nor accepted at the end.

    Attributes:
        frozen_parts: names of sub-modules, dotted.
        trains_sharded: it can train where each process has a part of the weights.
        learns_from: images, rollouts or pairs; None if it trains on nothing.
    """

    frozen_parts: tuple[str, ...] = ()
    trains_sharded = True
    learns_from: str | None = "images"
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
        if wrong := _not_finite(checkpoint.get("state_dict", {})):  # FSDP has taken its weights out by now
            raise ValueError(f"ckpt_path: {wrong}: take a checkpoint from before training diverged")
        self._epoch_steps = checkpoint.get("epoch_steps")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; raises ValueError, naming the first that does not fit."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:  # it lists them all
            own = self.state_dict()
            shapes = [(key, [*value.shape], [*own[key].shape]) for key, value in state_dict.items() if key in own]
            wrong = [f"{key} is missing" for key in own if key not in state_dict and not self._is_frozen(key)]
            wrong += [f"{key} is not of this module" for key in state_dict if key not in own]
            wrong += [f"{key} has the shape {shape} instead of {want}" for key, shape, want in shapes if shape != want]
            if not wrong:
                raise
            kind = type(self).__name__
            raise ValueError(f"ckpt_path: its weights are not those of this {kind}: {_first(wrong)}") from error

    def on_before_backward(self, loss: Tensor) -> None:
        wrong = (~loss.detach().isfinite()).any().float()
        if is_distributed():
            torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX)
        if wrong:
            raise ValueError(f"the training loss of step {self.global_step + 1} is not finite; {_DIVERGED}")

    def on_train_end(self) -> None:
        if wrong := _not_finite({name: weight for name, weight in self.named_parameters() if weight.requires_grad}):
            raise ValueError(f"{wrong} after step {self.global_step}; {_DIVERGED}")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: for `task=rollout` the data module makes what is wanted when it is asked for batches to predict."""

    def total_steps(self) -> int:
        """Optimizer steps that the Trainer's `max_steps` and `max_epochs` allow.

        An epoch counts as the first one did, also when resumed: its epochs may have other lengths by now, and a Trainer
        that is asked for their length before it is restored loses its place in the epoch.
        """
        trainer = self.trainer
        if trainer.max_epochs in (None, -1):
            return trainer.max_steps
        if self._epoch_steps is None:
            _ = trainer.estimated_stepping_batches  # makes the Trainer set up its loader
            self._epoch_steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        total = self._epoch_steps * trainer.max_epochs
        return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


class TrainedModule(ResumableModule):
    """A LightningModule that measures alike in validation and in the test.

    `optimizer` makes the optimizer from parameters, for `warmup_steps` of linear warm-up, then cosine decay to zero at
    the last step of the Trainer.
    """

    exported_parts: tuple[str, ...] = ()  # sub-modules that `task=export` writes, by the config nodes that build them

    def __init__(self, optimizer: OptimizerFactory, warmup_steps: int) -> None:
        super().__init__()
        self.optimizer, self.warmup_steps = optimizer, warmup_steps

    @property
    def exported(self) -> dict[str, nn.Module]:
        """The networks that `task=export` writes, by config node."""
        return {name: getattr(self, name) for name in self.exported_parts}

    def trained(self) -> list[Any]:
        """Return the parameters, or groups of them, for the optimizer."""
        return trainable(self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.parameters() if each.grad is not None])
        if isinstance(self.trainer.strategy, FSDPStrategy):  # each rank has the gradients of its shards
            squares = norm.square()
            torch.distributed.all_reduce(squares)
            norm = squares.sqrt()
        self.log_dict({"train/grad_norm": norm, "train/learning_rate": optimizer.param_groups[0]["lr"]})

    def measure(self, batch: dict[str, Any], stage: str) -> Any:
        """Log the metrics of a batch as `stage/NAME`."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.measure(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.measure(batch, "test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer, total = self.optimizer(self.trained()), self.total_steps()

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def _not_finite(weights: Mapping[str, Any]) -> str | None:
    """The start of a sentence on weights that are NaN or infinite, if there are any."""
    tensors = {key: weight for key, weight in weights.items() if isinstance(weight, Tensor)}
    wrong = [key for key, weight in tensors.items() if not weight.isfinite().all()]
    return f"weights are not finite: {_first(wrong)}" if wrong else None


def _first(faults: list[str]) -> str:
    """The first of a list, and the number of the others."""
    return faults[0] + (f" (and {len(faults) - 1} more)" if faults[1:] else "")


def _keep_frozen(module: ResumableModule, found: Any) -> None:
    """Strict loading misses no frozen part, which stays as it is (nor does FSDP, which has names of its own)."""
    found.missing_keys[:] = [key for key in found.missing_keys if not module._is_frozen(key.removeprefix(FSDP_PREFIX))]
