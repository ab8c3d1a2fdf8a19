"""VQ-16: the image tokenizer of LlamaGen (arXiv 2406.06525) and Janus, over transformers' network for Janus."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.image_tokenizer import ImageTokenizer, nearest
from lightning_modules.backbone.loading import Layout

_OWN = "network."  # our tensors are transformers', under this name
_ORIGINAL_PARTS = (  # transformers' names -> the original ones
    (r"^encoder\.down\.", "encoder.conv_blocks."),
    (r"^decoder\.up\.", "decoder.conv_blocks."),
    (r"\.block\.", ".res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)


def original_name(name: str) -> str:
    """The original network's name for a tensor of transformers' one."""
    for pattern, replacement in _ORIGINAL_PARTS:
        name = re.sub(pattern, replacement, name)
    return name


def _inside_janus(prefix: str, original: bool) -> Layout:
    """The tensors of a whole Janus that begin with a prefix; the others are not the tokenizer's."""

    def stored_as(key: str) -> list[str]:
        name = key.removeprefix(_OWN)
        return [prefix + (original_name(name) if original else name)]

    return Layout(stored_as, rf"(?!{re.escape(prefix)})|.*\.codebook_used$")


@dataclass(frozen=True)
class VQ16Config:
    """Sizes of the tokenizer. Levels are counted from the finest, which has an image's own resolution."""

    image_size: int = 384  # pixels along each side; halved from each level to the next
    codebook_size: int = 16384
    code_dim: int = 8  # numbers of a code vector
    base_channels: int = 128
    channel_multiplier: Sequence[int] = (1, 1, 2, 2, 4)  # channels of each level, as a multiple of `base_channels`
    num_res_blocks: int = 2  # of each level; the decoder has one more
    latent_channels: int = 256  # between the networks and the codes
    # Round pixels to the nearest of 256 levels, as LlamaGen's scripts do; otherwise they are truncated, as in Janus.
    round_pixels: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.stride:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.stride}, the pixels of a code")

    @property
    def stride(self) -> int:
        """Pixels of a code along each side."""
        return 2 ** (len(self.channel_multiplier) - 1)


class VQ16(ImageTokenizer):
    """A convolutional autoencoder whose codes are unit vectors: the nearest one of each latent, made a unit vector too.

    transformers' own `encode` makes neither a unit vector, and so finds other codes than the original.

    Raises:
        ImportError: transformers is not installed.
    """

    # As they are inside Janus, by transformers or by DeepSeek, and by themselves (LlamaGen).
    layouts = (
        _inside_janus("model.vqmodel.", original=False),
        _inside_janus("gen_vision_model.", original=True),
        Layout(lambda key: [original_name(key.removeprefix(_OWN))], r"quantize\.codebook_used$"),
    )

    def __init__(self, config: VQ16Config) -> None:
        try:
            from transformers import JanusVQVAE, JanusVQVAEConfig
        except ImportError as error:
            raise ImportError("VQ16 needs transformers: pip install -e '.[janus]'") from error
        super().__init__()
        self.config = config
        self.codebook_size, self.image_size = config.codebook_size, config.image_size
        self.grid = config.image_size // config.stride
        sizes = JanusVQVAEConfig(
            embed_dim=config.code_dim,
            num_embeddings=config.codebook_size,
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multiplier=list(config.channel_multiplier),
            num_res_blocks=config.num_res_blocks,
            num_patches=self.grid,
        )
        self.network: nn.Module = JanusVQVAE(sizes)

    def check_stored(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if Janus's config, by transformers or DeepSeek, is for images of another size."""
        vision = config.get("vision_config", {})
        stored = vision.get("params", vision).get("image_size", self.image_size)
        if stored != self.image_size:
            raise ValueError(
                f"Janus's config.json says that images have {stored} pixels, but tokenizer.module.config.image_size is "
                f"{self.image_size}"
            )

    @property
    def codebook(self) -> Tensor:
        """The unit vector of each code, [codebook_size, code_dim]."""
        return F.normalize(self.network.quantize.embedding.weight, dim=-1)  # type: ignore[union-attr, arg-type]

    @property
    def code_vectors(self) -> Tensor:
        return self.codebook * self.config.code_dim**0.5

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> latents before they are quantised, [B, code_dim, h, w]."""
        with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 would confuse look-alikes
            return self.network.quant_conv(self.network.encoder(2 * pixels - 1))  # type: ignore[operator]

    def encode(self, pixels: Tensor) -> Tensor:
        vectors = F.normalize(self.latents(pixels).movedim(1, -1).flatten(0, 2), dim=-1)
        return nearest(vectors, self.codebook, chunk=2048).view(len(pixels), -1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> pixels [B, 3, H, W] in [0, 1], with the bytes of the original scripts."""
        x = self.network.decode(tokens).float()  # type: ignore[operator]  # half precision has fewer than 256 levels
        if self.config.round_pixels:
            return (127.5 * x + 128).clamp(0, 255).floor() / 255
        return ((x + 1) / 2).clamp(0, 1)
