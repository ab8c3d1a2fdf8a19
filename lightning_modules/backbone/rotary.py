"""Rotary position embeddings (arXiv 2104.09864)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # torch.compile, which asks for a hash too early otherwise (torch 2.11)
class Rotary:
    """Rotates the first R dimensions of a head, in pairs, by angles that its position gives.

    Pairs are dimensions (i, i + R / 2), as in Llama, or `interleaved`, (2 i, 2 i + 1), which rotates whole heads. Where
    cosine and sine are both 0, queries and keys become 0.
    """

    cos: Tensor  # [S, R / 2], or [B, 1, S, R / 2] where rows stand at positions of their own
    sin: Tensor
    interleaved: bool = False

    @staticmethod
    def at(positions: Tensor, rotated: int, base: float = 10_000.0) -> "Rotary":
        """For positions [..., S], rotating the first `rotated` dimensions of a head."""
        frequencies = base ** -(torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated)
        angles = positions[..., None].float() * frequencies
        return Rotary(angles.cos(), angles.sin())

    def __getitem__(self, positions: Any) -> "Rotary":
        return Rotary(self.cos[positions], self.sin[positions], self.interleaved)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [B, heads, S, head_dim]."""
        if self.interleaved:
            first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            turned = first * self.cos - second * self.sin, second * self.cos + first * self.sin
            return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
        half = self.cos.shape[-1]
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
