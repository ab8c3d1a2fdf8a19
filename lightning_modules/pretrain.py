"""DecoderModule: likelihood training of the shared decoder on images with captions."""

from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.optim import OptimizerFactory, TrainedModule
from lightning_modules.ranks import uniform_rows


class DecoderModule(TrainedModule):
    """Trains log p(tokens | prompt); some prompts are dropped so that guidance has an unconditional branch.

    Batches have `image` [B, 3, H, W] in [0, 1] and `prompt` (B strings). The decoder's image tokenizer stays as it is.
    `prompt_dropout` is the fraction of prompts that the empty one replaces; for the rest see `TrainedModule`.
    """

    exported_parts = ("decoder",)
    frozen_parts = ("decoder.image_tokenizer",)

    def __init__(
        self, decoder: TokenDecoder, optimizer: OptimizerFactory, warmup_steps: int, prompt_dropout: float
    ) -> None:
        super().__init__(optimizer, warmup_steps)
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"module.prompt_dropout must lie in [0, 1], not {prompt_dropout}")
        self.decoder, self.prompt_dropout = decoder, prompt_dropout

    def _loss(self, batch: dict[str, Any], dropout: float) -> Tensor:
        """Mean negative log-likelihood, nats a predicted token."""
        keep = (uniform_rows(len(batch["prompt"])) >= dropout).tolist()
        prompts = [prompt if kept else "" for prompt, kept in zip(batch["prompt"], keep, strict=True)]
        return self.decoder.nll(prompts, self.decoder.image_tokenizer.encode(batch["image"]))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self._loss(batch, self.prompt_dropout)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for name, dropout in (("val/loss", 0.0), ("val/loss_unconditional", 1.0)):
            with isolate_rng():
                torch.manual_seed(batch_idx)  # the same masks each time
                loss = self._loss(batch, dropout)
            self.log(name, loss, prog_bar=not dropout, sync_dist=True, batch_size=len(batch["prompt"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", self._loss(batch, 0.0), sync_dist=True, batch_size=len(batch["prompt"]))
