"""An estimate of the memory that a run will need of each GPU, printed before it starts."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from callbacks.geneval import GenEvalCallback
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.optim import trainable


def saved_activations(config: TransformerConfig, positions: int, size: int) -> int:
    """Estimate the bytes that a training pass over some positions keeps for the backward pass, `size` bytes a number.

    A layer keeps, in widths: its input and norm (2), queries, keys, values before and after norm and rotation (7), keys
    and values beside the prompt's (2), what is attended to in two layouts (2), and the feed-forward layer's hidden
    states before and after its activation. With checkpointing only one layer has all that, the others their input.
    """
    layer = (13 + 2 * config.mlp_ratio) * config.dim
    widths = layer + config.depth * config.dim if config.checkpointing else config.depth * layer
    return int(positions * widths * size)


def decoding_activations(decoder: Any, images: int, prompt: int, size: int) -> int:
    """Estimate the bytes that decoding some images at a time takes, guidance included, `size` bytes a number.

    That is the keys and values of prompts of `prompt` tokens, and then the largest of: a layer's hidden states; the
    probabilities of all codes and their cumulative sum, in single precision; the finest level of the image tokenizer's
    decoder, of which four maps are there at a time.
    """
    config, tokenizer = decoder.transformer.config, decoder.image_tokenizer
    kept = 2 * config.depth * config.dim * images * prompt * size
    layer = 2 * images * (decoder.num_tokens + 2) * config.dim * (5 + 2 * config.mlp_ratio) * size
    codes = 2 * images * decoder.num_tokens * decoder.vocabulary.codes * 4
    maps = 0.0
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):  # the last one makes the pixels
            maps = 4 * images * (3 * tokenizer.image_size**2 / module.out_channels) * module.in_channels * size
    return int(kept + max(layer, codes, maps))


class MemoryEstimate(Callback):
    """Prints the memory that a mask-token decoder will need; kernels' workspaces and fragmentation come on top.

    Args:
        images_per_row: passes of an image that a row of a training batch takes; a pair of preferences takes two.
    """

    def __init__(self, images_per_row: int = 1) -> None:
        self.images_per_row = images_per_row

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and (stage == "fit" or trainer.state.fn == "test"):
            gigabytes = {name: size / 1e9 for name, size in self.estimate(trainer, pl_module, stage).items()}
            total = sum(gigabytes.values()) - min(gigabytes["training"], gigabytes["decoding"])
            parts = ", ".join(f"{name} {size:.3g}" for name, size in gigabytes.items() if size)
            print(f"Memory of each GPU: about {total:.3g} GB ({parts})")

    def estimate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, float]:
        """Estimate the bytes that a stage will need on each GPU, by what needs them.

        `optimizer` is AdamW's two moments. Of `training` and `decoding`, the activations that wait for the backward
        pass and those of a decoding step, only the larger are there at a time.
        """
        decoder: Any = pl_module.decoder
        weight = 2 if str(trainer.precision).endswith("-true") and "16" in str(trainer.precision) else 4
        size = 2 if "16" in str(trainer.precision) else 4
        shards = trainer.world_size if isinstance(trainer.strategy, FSDPStrategy) else 1
        trained = sum(p.numel() for p in trainable(pl_module)) if stage == "fit" else 0
        prompt = decoder.vocabulary.max_text + 1
        rows = 0
        if stage == "fit" and trainable(decoder):
            rows = self.images_per_row * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        kept = saved_activations(decoder.transformer.config, rows * (decoder.num_tokens + 2 + prompt), size)
        logits = 2 * rows * (decoder.num_tokens + 2) * decoder.vocabulary.total * 4
        images, judges = 0, 0.0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GenEvalCallback):
                evaluator = callback.evaluator
                names = callback.validation_strategies if stage == "fit" else callback.test_strategies
                images = evaluator.batch_size * max(evaluator.strategies[name].images_at_once for name in names)
                models = [model for judge in evaluator.judges.values() for model in vars(judge).values()]
                weights = [p for model in models if isinstance(model, nn.Module) for p in model.parameters()]
                judges = sum(p.numel() * torch.finfo(p.dtype).bits / 8 for p in weights)
        return {
            "parameters": sum(p.numel() for p in pl_module.parameters()) * weight / shards + judges,
            "gradients": trained * weight / shards,
            "optimizer": 2 * trained * weight / shards,
            "training": kept + logits,
            "decoding": decoding_activations(decoder, images, prompt, weight),
        }
