"""Emu3's image tokenizer (arXiv 2409.18869), over transformers' network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import Layout


class Emu3VQ(ImageTokenizer):
    """Emu3's autoencoder of films, by transformers; an image is a film of equal frames.

    Args:
        image_size: pixels along each side.
        sizes: what differs from the published ones, by its name in transformers' `Emu3VQVAEConfig`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: `image_size` is not a multiple of the pixels of a code.
    """

    layouts = (Layout(lambda key: ["vqmodel." + key.removeprefix("network.")], r"text_model\."),)

    def __init__(self, image_size: int = 720, sizes: Mapping[str, Any] | None = None) -> None:
        try:
            from transformers import Emu3VQVAE, Emu3VQVAEConfig
        except ImportError as error:
            raise ImportError("Emu3VQ needs transformers: pip install -e '.[janus]'") from error
        super().__init__()
        self.network: Any = Emu3VQVAE(Emu3VQVAEConfig(**(sizes or {})))
        self.codebook_size = self.network.config.codebook_size
        stride = self.network.spatial_scale_factor
        if image_size % stride:
            raise ValueError(f"image_size={image_size} is not a multiple of {stride}, the pixels of a code")
        self.image_size, self.grid = image_size, image_size // stride

    @property
    def code_vectors(self) -> Tensor:
        codebook = self.network.quantize.embedding.weight
        return (codebook - codebook.mean(0)) / codebook.std()

    def decoding_bytes(self, size: int) -> float:
        return super().decoding_bytes(size) * self.network.config.temporal_downsample_factor  # frames

    def encode(self, pixels: Tensor) -> Tensor:
        found = self.network.encode(2 * pixels - 1, [pixels.shape[2:]] * len(pixels))
        return torch.stack(found.image_tokens).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        pixels = self.network.decode(tokens.view(-1, self.grid, self.grid)).float()
        return ((pixels + 1) / 2).clamp(0, 1)
