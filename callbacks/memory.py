"""An estimate of the memory that a run will need of each GPU, printed before it starts."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from callbacks.geneval import GenEvalCallback
from lightning_modules.optim import trainable

_IN_TURN = ("training", "decoding", "stepping")


@dataclass(eq=False)
class MemoryEstimate(Callback):
    """Prints the memory that a run will need; kernels' workspaces and fragmentation come on top."""

    images_per_row: int = 1  # in a training batch; a pair of preferences has two

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and (stage == "fit" or trainer.state.fn == "test"):
            gigabytes = {name: size / 1e9 for name, size in self.estimate(trainer, pl_module, stage).items()}
            total = sum(gigabytes.values()) - sum(sorted(gigabytes[name] for name in _IN_TURN)[:-1])
            parts = ", ".join(f"{name} {size:.3g}" for name, size in gigabytes.items() if size)
            print(f"Memory of each GPU: about {total:.3g} GB ({parts})")

    def estimate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, float]:
        """Estimate the bytes that a stage will need on each GPU, by what needs them.

        `optimizer` is AdamW's two moments, `stepping` the roots of the second ones, of all weights at once. What is
        `_IN_TURN` is not there at the same time. Sharded parameters are gathered for two layers, and for all else.
        """
        decoder: Any = pl_module.decoder
        weight = 2 if str(trainer.precision).endswith("-true") and "16" in str(trainer.precision) else 4
        size = 2 if "16" in str(trainer.precision) else 4
        sharded = isinstance(trainer.strategy, FSDPStrategy)
        shards = trainer.world_size if sharded else 1
        gathered = _gathered(pl_module, trainer.strategy) * size if sharded else 0
        trained = sum(p.numel() for p in trainable(pl_module)) if stage == "fit" else 0
        rows = 0
        if stage == "fit" and trainable(decoder):
            rows = self.images_per_row * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        images, judges = 0, 0.0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GenEvalCallback):
                evaluator = callback.evaluator
                names = callback.evaluation(pl_module, pl_module.device, stage != "fit").strategies
                images = evaluator.batch_size * max(evaluator.strategies[name].images_at_once for name in names)
                models = [model for judge in evaluator.judges.values() for model in vars(judge).values()]
                weights = [p for model in models if isinstance(model, nn.Module) for p in model.parameters()]
                judges = sum(p.numel() * torch.finfo(p.dtype).bits / 8 for p in weights)
        return {
            "parameters": _numbers(pl_module) * weight / shards + gathered + decoder.text_bytes + judges,
            "gradients": trained * weight / shards,
            "optimizer": 2 * trained * weight / shards,
            "stepping": trained * weight / shards,
            # What is gathered in half precision is not cast once more, and the residual stream begins with it.
            "training": decoder.training_bytes(rows, size, size if sharded else weight),
            "decoding": decoder.decoding_bytes(images, weight),
        }


def _numbers(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _gathered(module: nn.Module, strategy: Any) -> int:
    """The weights that a process holds whole at a time: those of two layers, and all that are in no layer."""
    is_layer = strategy.kwargs["auto_wrap_policy"]
    layers = [_numbers(each) for each in module.modules() if is_layer(each, recurse=False, nonwrapped_numel=0)]
    return _numbers(module) - sum(layers) + 2 * max(layers, default=0)
