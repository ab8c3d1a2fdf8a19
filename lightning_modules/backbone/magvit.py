"""The MAGVIT-v2 image tokenizer: a convolutional autoencoder whose codes are the signs of its latents.

Method: Yu et al., "Language Model Beats Diffusion - Tokenizer is Key to Visual Generation" (arXiv:2310.05737). Layout,
names of tensors and defaults are those of the weights `showlab/magvitv2`, with which Show-o paints.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.attention import attend
from lightning_modules.backbone.image_tokenizer import ImageTokenizer

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class MagvitConfig:
    """Sizes of a MAGVIT-v2 tokenizer. Levels are counted from the finest, which has an image's own resolution."""

    image_size: int = 256  # pixels along each side; halved from each level to the next
    bits: int = 13  # channels of the latents, so that there are 2^bits codes
    encoder_widths: Sequence[int] = (128, 256, 256, 512, 512)  # channels of each level
    encoder_blocks: Sequence[int] = (4, 3, 4, 3, 4)  # residual blocks of each level
    decoder_widths: Sequence[int] = (128, 128, 256, 256, 512)
    decoder_blocks: Sequence[int] = (4, 4, 3, 4, 3)
    norm_groups: int = 32  # must divide all widths
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        per_level = (self.encoder_widths, self.encoder_blocks, self.decoder_widths, self.decoder_blocks)
        if len({len(values) for values in per_level}) > 1:
            raise ValueError(f"Widths and blocks have different numbers of levels: {', '.join(map(str, per_level))}")
        if self.image_size % self.stride:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.stride}, the pixels of a code")

    @property
    def stride(self) -> int:
        """Pixels of a code along each side."""
        return 2 ** (len(self.encoder_widths) - 1)

    def norm(self, width: int) -> nn.Module:
        return nn.GroupNorm(self.norm_groups, width, self.norm_eps)


class ResidualBlock(nn.Module):
    """Twice norm, swish and convolution, with a connection around them: [B, inputs, H, W] -> [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class SpatialAttention(nn.Module):
    """Self-attention of one head among all positions of [B, width, H, W], with a connection around it."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, H * W, width]
        attended = attend(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(attended)


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers that run in turn and have names."""
    return nn.Sequential(OrderedDict(layers))


def residual_blocks(inputs: int, outputs: int, count: int, norm: Norm) -> nn.Sequential:
    """A level's blocks, of which the first changes the width."""
    return nn.Sequential(*(ResidualBlock(outputs if i else inputs, outputs, norm) for i in range(count)))


def middle(width: int, norm: Norm) -> nn.Sequential:
    """The blocks of the coarsest level, between encoder and codes and between codes and decoder."""
    return named(
        block_1=ResidualBlock(width, width, norm),
        attn_1=SpatialAttention(width, norm),
        block_2=ResidualBlock(width, width, norm),
    )


def make_encoder(config: MagvitConfig) -> nn.Sequential:
    """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, bits, h, w]."""
    levels: list[nn.Sequential] = []
    inputs = config.encoder_widths[0]
    for width, count in zip(config.encoder_widths, config.encoder_blocks, strict=True):
        if levels:
            pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom only
            levels[-1].add_module("downsample", named(pad=pad, conv=nn.Conv2d(inputs, inputs, 3, stride=2)))
        levels.append(named(block=residual_blocks(inputs, width, count, config.norm)))
        inputs = width
    return named(
        conv_in=nn.Conv2d(3, config.encoder_widths[0], 3, padding=1),
        down=nn.Sequential(*levels),
        mid=middle(inputs, config.norm),
        norm_out=config.norm(inputs),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(inputs, config.bits, 3, padding=1),
        quant_conv=nn.Conv2d(config.bits, config.bits, 1),
    )


def make_decoder(config: MagvitConfig) -> nn.Sequential:
    """Code vectors [B, bits, h, w] -> pixels [B, 3, H, W], about in [-1, 1]."""
    levels: dict[str, nn.Module] = {}  # in the order they run; names count from the finest
    inputs = config.decoder_widths[-1]
    for level, width in reversed(list(enumerate(config.decoder_widths))):
        blocks = named(block=residual_blocks(inputs, width, config.decoder_blocks[level], config.norm))
        if level:
            conv = nn.Conv2d(width, width, 3, padding=1)
            blocks.add_module("upsample", named(nearest=nn.Upsample(scale_factor=2), conv=conv))
        levels[str(level)], inputs = blocks, width
    return named(
        post_quant_conv=nn.Conv2d(config.bits, config.bits, 1),
        conv_in=nn.Conv2d(config.bits, config.decoder_widths[-1], 3, padding=1),
        mid=middle(config.decoder_widths[-1], config.norm),
        up=named(**levels),
        norm_out=config.norm(inputs),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(inputs, 3, 3, padding=1),
    )


class LookupFreeQuantizer(nn.Module):
    """Codes whose bits say which latents are above 0, the first channel being the most significant."""

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        codes = torch.arange(2**bits)[:, None]
        self.register_buffer("embedding", torch.where((codes & powers) > 0, 1.0, -1.0))
        self.register_buffer("power_vals", powers)

    def indices(self, z: Tensor) -> Tensor:
        """Latents [B, bits, h, w] -> codes, int64 [B, h, w]. Zeros of both signs are bits that are 0."""
        return ((z > 0) * self.power_vals.view(-1, 1, 1)).sum(1)

    def entries(self, indices: Tensor) -> Tensor:
        """Codes [B, h, w] -> their vectors of +1 and -1, [B, bits, h, w]."""
        return self.embedding[indices].movedim(-1, 1)


class MagvitV2(ImageTokenizer):
    """The tokenizer: both networks, with the quantizer between them."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.image_size = 2**config.bits, config.image_size
        self.grid = config.image_size // config.stride
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.quantize = LookupFreeQuantizer(config.bits)

    @property
    def code_vectors(self) -> Tensor:
        return self.quantize.embedding

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> latents before they are quantised, [B, bits, h, w]."""
        with torch.autocast(pixels.device.type, enabled=False):  # latents near 0 would change sign in bfloat16
            return self.encoder(2 * pixels - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.quantize.indices(self.latents(pixels)).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        vectors = self.quantize.entries(tokens.unflatten(1, (self.grid, self.grid)))
        pixels = self.decoder(vectors).float()  # half precision has fewer than 256 greys
        return ((pixels + 1) / 2).clamp(0, 1)
