"""Image tokenizers: pixels to a grid of codes, or of vectors, and back."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.hub import HubMixin


class ImageTokenizer(HubMixin, nn.Module):
    """Turns pixels into a grid of codes and back. Denoising decoders have vectors [B, T, D] instead of codes [B, T]."""

    codebook_size: int  # number of different codes
    grid: int  # codes along each side; an image has grid x grid tokens, row by row
    image_size: int  # pixels along each side

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def code_vectors(self) -> Tensor:
        """A vector for each code, [codebook_size, D], about unit scale; codes that look alike have similar ones."""
        raise ValueError(f"{type(self).__name__} has no code vectors")

    def decoding_bytes(self, size: int) -> float:
        """Estimate what decoding an image takes: four maps before its last convolution, `size` bytes a number."""
        maps = 0.0
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the last one makes the pixels
                maps = 4 * (3 * self.image_size**2 / module.out_channels) * module.in_channels * size
        return maps

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> tokens, int64 [B, T]."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> pixels [B, 3, H, W] in [0, 1]."""


class CodeVectors(ImageTokenizer):
    """Takes the vectors of codes for tokens, [B, T, D]; any other vector is the nearest code's.

    Args:
        tokenizer: whose codes they are; it has `code_vectors`.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.codebook_size, self.grid, self.image_size = tokenizer.codebook_size, tokenizer.grid, tokenizer.image_size

    @property
    def code_vectors(self) -> Tensor:
        return self.tokenizer.code_vectors

    def codes(self, tokens: Tensor) -> Tensor:
        """Vectors [B, T, D] -> the nearest codes, int64 [B, T]."""
        return nearest(tokens.flatten(0, 1), self.code_vectors).view(tokens.shape[:2])

    def encode(self, pixels: Tensor) -> Tensor:
        return self.code_vectors[self.tokenizer.encode(pixels)]

    def decode(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(self.codes(tokens))


class PatchVQ(ImageTokenizer):
    """A vector-quantised autoencoder whose code vectors are pixel patches.

    The encoder takes the nearest code vector of each patch; the decoder is a convolutional network that corrects each
    code's patch by its neighbours. Codes come from k-means (`fit_codebook`): a codebook that is trained jointly
    collapses on pictures that are mostly background.
    """

    codebook: Tensor

    def __init__(self, codebook_size: int, grid: int, image_size: int, width: int, blocks: int) -> None:
        super().__init__()
        if image_size % grid:
            raise ValueError(f"image_size={image_size} is not a multiple of grid={grid}")
        self.codebook_size, self.grid, self.image_size = codebook_size, grid, image_size
        self.patch = image_size // grid
        self.register_buffer("codebook", torch.zeros(codebook_size, 3 * self.patch**2))
        self.embedding = nn.Embedding(codebook_size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.head = nn.Conv2d(width, 3 * self.patch**2, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    @property
    def code_vectors(self) -> Tensor:
        centred = self.codebook - self.codebook.mean(0)
        return centred / centred.std().clamp(min=1e-6)

    def patches(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, 3 * patch * patch]."""
        return F.pixel_unshuffle(pixels, self.patch).flatten(2).transpose(1, 2)

    def encode(self, pixels: Tensor) -> Tensor:
        return nearest(self.patches(pixels).flatten(0, 1), self.codebook).view(len(pixels), -1)

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """Decode without clamping to [0, 1], for training."""
        grid = (len(tokens), self.grid, self.grid)
        x = self.embedding(tokens).view(*grid, -1).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = x + block(x)
        patches = self.codebook[tokens].view(*grid, -1).permute(0, 3, 1, 2) + self.head(x)
        return F.pixel_shuffle(patches, self.patch)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.reconstruct(tokens).clamp(0, 1)

    @torch.no_grad()
    def fit_codebook(self, pixels: Tensor, iterations: int, generator: torch.Generator) -> float:
        """Set the codebook by k-means on the distinct patches of images [N, 3, H, W] in [0, 1], and return its error.

        Every distinct patch counts once: background would take the codes. It runs on the CPU, so the codes do not
        depend on the device. The error is the mean squared distance of a patch to its code, summed over its pixels.
        """
        patches = (self.patches(pixels).flatten(0, 1) * 255).round().to(torch.uint8).unique(dim=0) / 255
        if len(patches) < self.codebook_size:
            raise ValueError(f"{len(patches)} distinct patches cannot fill a codebook of {self.codebook_size}")
        codebook = torch.zeros(self.codebook.shape)
        distance = torch.full((len(patches),), torch.inf)
        for code in range(self.codebook_size):  # k-means++: far patches become codes first
            if code:
                pick = torch.multinomial(distance, 1, generator=generator)
            else:
                pick = torch.randint(len(patches), (1,), generator=generator)
            codebook[code] = patches[pick]
            distance = torch.minimum(distance, (patches - patches[pick]).square().sum(1))
        for _ in range(iterations):
            nearest_code = nearest(patches, codebook)
            count = torch.bincount(nearest_code, minlength=self.codebook_size)
            total = torch.zeros_like(codebook).index_add_(0, nearest_code, patches)
            filled = count > 0
            codebook[filled] = total[filled] / count[filled, None]
        self.codebook.copy_(codebook)
        return float((patches - codebook[nearest(patches, codebook)]).square().sum(1).mean())


def nearest(vectors: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Index of the nearest code (Euclidean) of each vector: [N, D], [K, D] -> int64 [N]."""
    norms = codebook.square().sum(1)
    with torch.autocast(vectors.device.type, enabled=False):  # look-alikes differ by less than bfloat16 resolves
        return torch.cat([(norms - 2 * part @ codebook.T).argmin(1) for part in vectors.split(chunk)])


def upsample_patches(scores: Tensor, grid: int) -> Tensor:
    """Scores of M x M patches [B, M, M] -> of the tokens in them, [B, T]."""
    side = patch_side(grid, scores.shape[1])
    return scores.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1)


def patch_side(grid: int, patches: int) -> int:
    """Tokens along each side of a patch; raises ValueError if the grid cannot be cut into so many."""
    if grid % patches:
        raise ValueError(f"{grid}x{grid} tokens cannot be cut into {patches}x{patches} patches")
    return grid // patches
