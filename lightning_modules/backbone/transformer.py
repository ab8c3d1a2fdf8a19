"""The one Transformer of the project: full passes for training, single steps against a key/value cache for decoding."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KVCache:
    """Keys and values of a decoded prefix, with those of the candidates for its next position.

    The prefix is stored once per row; candidates attend to it without copying it. `commit` keeps one of them.

    Attributes:
        keys, values: per layer, [B, heads, capacity, head_dim]; the first `length` positions are filled.
        length: positions filled.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._candidates: list[tuple[Tensor, Tensor]] = []

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """Add a layer whose first positions are these keys and values, [B, heads, S, head_dim]."""
        self.length = key.shape[2]
        for store, filled in ((self.keys, key), (self.values, value)):
            room = filled.new_zeros(*filled.shape[:2], self.capacity, filled.shape[3])
            room[:, :, : self.length] = filled
            store.append(room)

    def propose(self, key: Tensor, value: Tensor) -> None:
        """Add a layer's keys and values of the k candidates, [B, heads, k, head_dim]."""
        self._candidates.append((key, value))

    def forget(self) -> None:
        """Drop the candidates, if any: others are proposed for the same position."""
        self._candidates.clear()

    def commit(self, choice: Tensor) -> None:
        """Append candidate `choice` [B] of each row to the prefix and forget the others."""
        index = choice.view(-1, 1, 1, 1)
        for layer, (key, value) in enumerate(self._candidates):
            expanded = index.expand(-1, key.shape[1], 1, key.shape[3])
            self.keys[layer][:, :, self.length] = key.gather(2, expanded).squeeze(2)
            self.values[layer][:, :, self.length] = value.gather(2, expanded).squeeze(2)
        self.forget()
        self.length += 1

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of rows `rows` [B'], in that order and as often as they occur."""
        chosen = KVCache(self.capacity)
        chosen.length = self.length
        chosen.keys = [key[rows] for key in self.keys]
        chosen.values = [value[rows] for value in self.values]
        return chosen


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a pre-norm Transformer.

    Attributes:
        dim: width.
        depth: number of layers.
        heads: attention heads; must divide `dim`.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of `dim`.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"Transformer width dim={self.dim} is not a multiple of heads={self.heads}")


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention, [B, heads, S, head_dim] each.

    On CPUs by plain matrix products: the backward pass of the fused kernel is slow there, in bfloat16 three times so.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, dim] -> q, k, v, each [B, heads, S, head_dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, causal: bool, cache: KVCache | None = None) -> Tensor:
        """Attend within x [B, S, dim]; with a cache, leave keys and values there."""
        q, k, v = self._split(x)
        if cache is not None:
            cache.prefill(k, v)
        attended = attend(q, k, v, causal)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Each of the k candidates x [B, k, dim] attends to the cached prefix and to itself."""
        q, k, v = self._split(x)
        cache.propose(k, v)
        q = q * q.shape[-1] ** -0.5
        prefix = q @ cache.keys[layer][:, :, : cache.length].transpose(2, 3)  # [B, heads, k, length]
        weights = torch.cat([prefix, (q * k).sum(-1, keepdim=True)], dim=-1).softmax(-1)
        attended = weights[..., :-1] @ cache.values[layer][:, :, : cache.length] + weights[..., -1:] * v
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward layer, each with a layer norm before and a residual connection around it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(nn.Linear(config.dim, hidden), nn.GELU(), nn.Linear(hidden, config.dim))

    def forward(self, x: Tensor, causal: bool, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), causal, cache)
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        x = x + self.attention.step(self.attention_norm(x), cache, layer)
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

    def forward(self, x: Tensor, causal: bool, cache: KVCache | None = None) -> list[Tensor]:
        """Full pass over x [B, S, dim]; returns the hidden states [B, S, dim] after every layer."""
        hidden = []
        for block in self.blocks:
            x = block(x, causal, cache)
            hidden.append(x)
        return hidden

    def step(self, x: Tensor, cache: KVCache) -> list[Tensor]:
        """One position, k alternatives: x [B, k, dim] against the cached prefix; hidden states after every layer."""
        cache.forget()
        hidden = []
        for layer, block in enumerate(self.blocks):
            x = block.step(x, cache, layer)  # type: ignore[operator]
            hidden.append(x)
        return hidden
