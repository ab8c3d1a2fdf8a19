"""The Transformer of the project."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_modules.backbone.attention import AttentionFn, ExtendAttention, FullAttention, StepAttention
from lightning_modules.backbone.kv_cache import KVCache
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.rotary import Rotary


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a pre-norm Transformer, and where models differ.

    Llama's has `rms_norm`, `swiglu` and no `bias`. With `checkpointing`, training keeps only each layer's input and
    computes the rest again in the backward pass: a third more time, a twentieth of the memory (arXiv 1604.06174).
    """

    dim: int  # width
    depth: int  # number of layers
    heads: int  # attention heads; must divide `dim`
    mlp_ratio: float = 4.0  # hidden width of the feed-forward layers, as a multiple of `dim`
    parallel: bool = False  # attention and feed-forward layer read the same norm, and both are added to the input
    qk_norm: bool = False  # layer norms over the head's width on queries and keys, shared by all heads of a layer
    gelu: Literal["none", "tanh"] = "none"  # exact or by tanh
    rms_norm: bool = False  # norms divide by the root mean square (arXiv 1910.07467) instead of standardising
    swiglu: bool = False  # feed-forward layers gate, silu(gate) * up, both of the hidden width (arXiv 2002.05202)
    bias: bool = True  # of linear layers
    norm_eps: float = 1e-5  # added to what norms divide by, before its root is taken
    kv_heads: int | None = None  # heads of keys and values, each read by a group of heads (arXiv 2305.13245); null: all
    checkpointing: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"Transformer width dim={self.dim} is not a multiple of heads={self.heads}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"Transformer heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    def saved_bytes(self, positions: int, size: int, stream: int) -> float:
        """Estimate what a training pass over some positions keeps for the backward pass on a GPU.

        A number takes `size` bytes, in the residual stream `stream`: in mixed precision that is single. A layer keeps,
        in widths: input (in the stream) and output of its norms, queries, keys, values (3), rotated queries and keys
        (2), what is attended to (1), two more of queries and keys with norms, which are in single precision (4), and
        hidden states before and after the activation (2, with a gate 4). With checkpointing one layer has all that.
        """
        norms = 1 if self.parallel else 2
        inner = 6 + (4 if self.qk_norm else 0) + (4 if self.swiglu else 2) * self.mlp_ratio
        layer = norms * (stream + size) + inner * size
        return positions * self.dim * (layer + self.depth * stream if self.checkpointing else self.depth * layer)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def norm(self) -> nn.Module:
        """A norm over the width; a decoder's last one comes after the Transformer."""
        return (nn.RMSNorm if self.rms_norm else nn.LayerNorm)(self.dim, eps=self.norm_eps)


class Attention(nn.Module):
    """Multi-head self-attention. Keys and values that a group of heads reads are repeated, in caches as well."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        kv_heads = config.kv_heads or config.heads
        self.heads, self.group = [config.heads, kv_heads, kv_heads], config.heads // kv_heads
        self.qkv = Linear(config.dim, sum(self.heads) * config.head_dim, bias=config.bias)
        self.proj = Linear(config.dim, config.dim, bias=config.bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(config.head_dim) if config.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor, layer: int, attending: AttentionFn) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2).split(self.heads, dim=1)
        k = self.k_norm(k)
        if self.group > 1:
            k, v = (part.repeat_interleave(self.group, dim=1) for part in (k, v))
        attended = attending(layer, self.q_norm(q), k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gates one half of its input by the other, [..., 2 H] -> [..., H] (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class Block(nn.Module):
    """Attention and feed-forward layer with norms before and residual connections around them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = round(config.dim * config.mlp_ratio)
        activation = SwiGLU() if config.swiglu else nn.GELU(approximate=config.gelu)
        self.attention_norm = config.norm()
        self.attention = Attention(config)
        self.mlp_norm = None if config.parallel else config.norm()
        self.mlp = nn.Sequential(
            Linear(config.dim, 2 * hidden if config.swiglu else hidden, bias=config.bias),
            activation,
            Linear(hidden, config.dim, bias=config.bias),
        )

    def forward(self, x: Tensor, layer: int, attending: AttentionFn) -> Tensor:
        normed = self.attention_norm(x)
        attended = self.attention(normed, layer, attending)
        if self.mlp_norm is None:
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A stack of blocks. Inputs carry their position embeddings already; outputs are not yet normalised."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Residual branches start small so that the sum over depth keeps unit scale (GPT-2).
                scale = (2 * config.depth) ** -0.5 if name.endswith(("proj.weight", "mlp.2.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def layers(self, x: Tensor, attending: AttentionFn) -> Iterator[Tensor]:
        """A pass over x [B, S, dim]; yields the hidden states [B, S, dim] after each layer."""
        for layer, block in enumerate(self.blocks):
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, attending, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layer, attending)
            yield x

    def run(self, x: Tensor, attending: AttentionFn) -> list[Tensor]:
        """The hidden states [B, S, dim] after every layer of a pass over x [B, S, dim]."""
        return list(self.layers(x, attending))

    def last(self, x: Tensor, attending: AttentionFn) -> Tensor:
        """The hidden states [B, S, dim] after the last layer; the others are not kept."""
        return deque(self.layers(x, attending), maxlen=1).pop()

    def forward(
        self,
        x: Tensor,
        causal: bool,
        cache: KVCache | None = None,
        rotary: Rotary | None = None,
        padding: Tensor | None = None,
    ) -> list[Tensor]:
        """Full pass over x [B, S, dim], whose positions attend to one another; it fills the cache, if any.

        Rows of a causal pass may have some `padding` on the left, numbers of positions [B] on the CPU.
        """
        return self.run(x, FullAttention(causal, rotary, padding, cache))

    def step(self, x: Tensor, cache: KVCache, rotary: Rotary | None = None) -> list[Tensor]:
        """One position: each of k alternatives x [B, k, dim] attends to the cached prefix and to itself."""
        attention = StepAttention.of(cache, rotary, x.device)
        cache.candidates = attention.candidates  # others may have been proposed for the same position
        return self.run(x, attention)

    def extend(self, x: Tensor, counts: Tensor, cache: KVCache, rotary: Rotary | None = None) -> list[Tensor]:
        """The next positions of each row attend to the cached prefix and to those before them, and join the cache.

        Of row b of x [B, S, dim] the first counts[b] are read, the others are padding; counts [B] are on the CPU.
        """
        cache.candidates = []
        return self.run(x, ExtendAttention(cache, counts, x.shape[1], rotary, x.device))
