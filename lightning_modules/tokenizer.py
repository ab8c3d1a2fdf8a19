"""ImageTokenizerModule: fits the codebook of a patch VQ autoencoder and trains its decoder."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.backbone.image_tokenizer import PatchVQ
from lightning_modules.optim import OptimizerFactory, TrainedModule


class ImageTokenizerModule(TrainedModule):
    """Fits the codebook once, before the first step, and trains the decoder by regression.

    K-means makes `codebook_iterations` passes over the first `codebook_images` training images; for the rest see
    `TrainedModule`. Batches have `image` [B, 3, H, W] in [0, 1].
    """

    exported_parts = ("tokenizer",)

    def __init__(
        self,
        tokenizer: PatchVQ,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        codebook_images: int,
        codebook_iterations: int,
    ) -> None:
        super().__init__(optimizer, warmup_steps)
        self.tokenizer, self.codebook_images = tokenizer, codebook_images
        self.codebook_iterations = codebook_iterations

    def on_train_start(self) -> None:
        if self.tokenizer.codebook.any():  # resumed: the codebook came with the checkpoint
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        images = data.collate([data.train_dataset[i] for i in range(self.codebook_images)])["image"]
        error = self.tokenizer.fit_codebook(images, self.codebook_iterations, torch.Generator().manual_seed(0))
        rank_zero_info(f"Codebook of {self.tokenizer.codebook_size} patches: squared error {error:.4f} a patch")

    def _reconstruct(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean absolute and mean squared error of the reconstruction."""
        error = self.tokenizer.reconstruct(self.tokenizer.encode(batch["image"])) - batch["image"]
        return error.abs().mean(), error.square().mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        absolute, squared = self._reconstruct(batch)
        self.log_dict({"train/l1": absolute, "train/mse": squared}, prog_bar=True)
        return absolute + 4 * squared

    def measure(self, batch: dict[str, Any], stage: str) -> None:
        absolute, squared = self._reconstruct(batch)
        metrics = {f"{stage}/l1": absolute, f"{stage}/mse": squared}
        self.log_dict(metrics, prog_bar=stage == "val", sync_dist=True, batch_size=len(batch["image"]))
