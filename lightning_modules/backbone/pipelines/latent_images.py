"""The image autoencoder of a pipeline: pixels to latents and back."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.pipelines.family import pack, unpack

_PIXELS_AT_ONCE = 4 * 1024**2  # of images that are decoded side by side: those of a megapixel take gigabytes each


class LatentImages(ImageTokenizer):
    """Takes patches of latents for tokens, vectors scaled as the pipeline's network reads them.

    Args:
        vae: the autoencoder. One that overflows in half precision (its config says so) decodes in single precision.
        size: pixels along each side of an image.
        factor: pixels along each side of a latent.
        patch: latents along each side of a token.

    Raises:
        ValueError: images of this size have no whole number of tokens.
    """

    def __init__(self, vae: Any, size: int, factor: int, patch: int) -> None:
        super().__init__()
        if size % (factor * patch):
            raise ValueError(f"decoder.size must be a multiple of {factor * patch}, not {size}")
        self.vae, self.patch, self.image_size, self.grid = vae, patch, size, size // (factor * patch)
        config = vae.config
        self._of_videos = "z_dim" in config  # an image is a video of one frame (Qwen-Image)
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
        std = config.get("latents_std") or [1.0]
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1) / config.get("scaling_factor", 1.0)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.vae.config["z_dim" if self._of_videos else "latent_channels"]

    def decoding_bytes(self, size: int) -> float:
        """Estimate what decoding some images at a time takes: four maps of its last convolution's input."""
        pixels = max(_PIXELS_AT_ONCE, self.image_size**2)
        return 4.0 * pixels * self.vae.decoder.conv_out.in_channels * size

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> tokens [B, T, D], the likeliest ones."""
        latents = self._encode(2 * pixels.to(self.vae.dtype) - 1).float()
        return pack((latents - self._mean.to(latents)) / self._std.to(latents), self.patch)

    def decode(self, tokens: Tensor) -> Tensor:
        latents = unpack(tokens.float(), self.patch)
        latents = latents * self._std.to(latents) + self._mean.to(latents)
        dtype = self.vae.dtype
        overflows = dtype == torch.float16 and self.vae.config.get("force_upcast")
        if overflows:
            self.vae.float()
        parts = latents.to(self.vae.dtype).split(max(1, _PIXELS_AT_ONCE // self.image_size**2))
        images = torch.cat([self._decode(part).float() for part in parts])
        if overflows:
            self.vae.to(dtype)
        return (0.5 + 0.5 * images).clamp(0, 1)

    def _encode(self, images: Tensor) -> Tensor:
        found = self.vae.encode(images[:, :, None] if self._of_videos else images)
        latents = found.latent if "latent" in found else found.latent_dist.mode()
        return latents[:, :, 0] if self._of_videos else latents

    def _decode(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(latents[:, :, None] if self._of_videos else latents, return_dict=False)[0]
        return images[:, :, 0] if self._of_videos else images
