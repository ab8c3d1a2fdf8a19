"""MemoryEstimate: what a run will need of each GPU's memory, printed before it starts."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from callbacks.geneval import GenEvalCallback
from lightning_modules.backbone.magvit import MagvitV2
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.transformer import TransformerConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU. Of activations only the larger of training's and decoding's are there at a time.

    Attributes:
        parameters: P of the LightningModule's and the judges' parameters.
        gradients: of the P' that are trained.
        optimizer: AdamW's two moments, 2 P'.
        training: activations that wait for the backward pass; see `saved_activations`.
        decoding: activations of a decoding step; see `decoding_activations`.
    """

    parameters: float
    gradients: float = 0.0
    optimizer: float = 0.0
    training: float = 0.0
    decoding: float = 0.0

    def __str__(self) -> str:
        gigabytes = {entry.name: getattr(self, entry.name) / 1e9 for entry in fields(self)}
        largest = min(("training", "decoding"), key=gigabytes.__getitem__)
        total = sum(gigabytes.values()) - gigabytes[largest]
        parts = ", ".join(f"{name} {size:.3g}" for name, size in gigabytes.items() if size)
        return f"Memory of each GPU: about {total:.3g} GB ({parts})"


def saved_activations(config: TransformerConfig, positions: int, size: int) -> int:
    """Bytes that a training pass over some positions keeps for the backward pass, `size` bytes a number.

    A layer keeps, in widths: its input and norm (2), queries, keys, values before and after norm and rotation (7), keys
    and values beside the prompt's (2), what is attended to in two layouts (2), and the feed-forward layer's hidden
    states before and after its activation. With checkpointing only one layer has all that, the others their input.
    """
    layer = (13 + 2 * config.mlp_ratio) * config.dim
    widths = layer + config.depth * config.dim if config.checkpointing else config.depth * layer
    return int(positions * widths * size)


def decoding_activations(decoder: MaskTokenDecoder, images: int, prompt: int, size: int) -> int:
    """Bytes that decoding some images at a time takes at most, guidance included, `size` bytes a number.

    That is the keys and values of prompts of `prompt` tokens, and then the largest of: a layer's hidden states; the
    probabilities of all codes and their cumulative sum, in single precision; the finest level of the image tokenizer's
    decoder, of which four maps are there at a time.
    """
    config, tokenizer = decoder.transformer.config, decoder.image_tokenizer
    kept = 2 * config.depth * config.dim * images * prompt * size
    layer = 2 * images * (decoder.num_tokens + 2) * config.dim * (5 + 2 * config.mlp_ratio) * size
    codes = 2 * images * decoder.num_tokens * decoder.vocabulary.codes * 4
    width = tokenizer.config.decoder_widths[0] if isinstance(tokenizer, MagvitV2) else 0
    maps = 4 * images * tokenizer.image_size**2 * width * size
    return int(kept + max(layer, codes, maps))


class MemoryEstimate(Callback):
    """For mask-token decoders. Kernels' workspaces and fragmentation come on top, often a tenth.

    Args:
        images_per_row: passes of an image that a row of a training batch takes; a pair of preferences takes two.
    """

    def __init__(self, images_per_row: int = 1) -> None:
        self.images_per_row = images_per_row

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and (stage == "fit" or trainer.state.fn == "test"):
            print(self.estimate(trainer, pl_module, stage))

    def estimate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> Memory:
        """What a stage will need."""
        decoder: Any = pl_module.decoder
        weight = 2 if str(trainer.precision).endswith("-true") and "16" in str(trainer.precision) else 4
        size = 2 if "16" in str(trainer.precision) else 4
        shards = trainer.world_size if isinstance(trainer.strategy, FSDPStrategy) else 1
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad) if stage == "fit" else 0
        config, length = decoder.transformer.config, decoder.num_tokens + 2 + decoder.vocabulary.max_text + 1
        rows = 0
        if stage == "fit" and decoder.embed.weight.requires_grad:
            rows = self.images_per_row * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        logits = 2 * rows * (decoder.num_tokens + 2) * decoder.vocabulary.total * 4
        images, judges = 0, 0.0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GenEvalCallback):
                evaluator = callback.evaluator
                names = callback.validation_strategies if stage == "fit" else callback.test_strategies
                images = evaluator.batch_size * max(evaluator.strategies[name].images_at_once for name in names)
                models = [model for judge in evaluator.judges.values() for model in vars(judge).values()]
                judges = sum(_bytes(model) for model in models if isinstance(model, nn.Module))
        return Memory(
            parameters=sum(p.numel() for p in pl_module.parameters()) * weight / shards + judges,
            gradients=trained * weight / shards,
            optimizer=2 * trained * weight / shards,
            training=saved_activations(config, rows * length, size) + logits,
            decoding=decoding_activations(decoder, images, decoder.vocabulary.max_text + 1, weight),
        )


def _bytes(model: nn.Module) -> float:
    return float(sum(p.numel() * torch.finfo(p.dtype).bits / 8 for p in model.parameters()))
