"""The Transformer of the project, and the keys and values that its passes leave behind."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_BLOCK = 4  # positions by which caches grow

# How positions attend to one another, and to others whose keys and values the function holds: a layer's index, its
# queries, keys and values, [B, heads, S, head_dim] -> the attended values, of the same shape.
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class KVCache:
    """Keys and values of decoded prefixes, of different lengths, and of the candidates for their next positions.

    A prefix is stored once; candidates attend to it without copying it. `commit` takes one of them.
    """

    capacity: int  # positions that a prefix will have at most, so that memory is asked for once
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # of each row, [B], on the CPU
    keys: list[Tensor] = field(default_factory=list)  # per layer, [B, heads, room + 1, head_dim]; padding is put last
    values: list[Tensor] = field(default_factory=list)
    candidates: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # keys and values of k, per layer
    _spare: Tensor | None = None  # memory for the next layer that needs more room

    @property
    def length(self) -> int:
        """That of the longest row."""
        return int(self.lengths.max())

    @property
    def room(self) -> int:
        """Positions that there is memory for in each row."""
        return self.keys[0].shape[2] - 1

    def reserve(self, length: int) -> None:
        """Make room for prefixes of some length, but never much more.

        On CPUs gaps between prefixes make reading up to four times as slow; to move them now and then takes less. A
        layer moves to memory that another one has left: to touch new memory takes longer than to copy.
        """
        if length <= self.room:
            return
        for layers in (self.keys, self.values):
            for layer, filled in enumerate(layers):
                layers[layer] = self._place(filled, length)
                self._spare = filled.new_empty(0).set_(filled.untyped_storage())

    def _place(self, filled: Tensor, length: int) -> Tensor:
        """[B, heads, S, head_dim] -> a copy with room for `length` positions, in blocks, and one for padding."""

        def shape(positions: int) -> tuple[int, ...]:
            return *filled.shape[:2], -(-positions // _BLOCK) * _BLOCK + 1, filled.shape[3]

        size = math.prod(shape(length))
        if self._spare is None or len(self._spare) < size:
            self._spare = filled.new_empty(math.prod(shape(max(length, self.capacity))))
        room, self._spare = self._spare[:size].view(shape(length)), None
        room[:, :, : filled.shape[2]] = filled
        # No attention goes to what is not filled, but 0 times what memory held may not be 0.
        room[:, :, filled.shape[2] :] = 0
        return room

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """Add a layer that begins with these keys and values, [B, heads, S, head_dim]."""
        self.lengths = torch.full((len(key),), key.shape[2])
        self.keys.append(self._place(key, key.shape[2]))
        self.values.append(self._place(value, key.shape[2]))

    def commit(self, choice: Tensor) -> None:
        """Append candidate `choice` [B] of each row to the prefix and forget the others."""
        self.reserve(self.length + 1)
        rows, everything = torch.arange(len(choice), device=choice.device), slice(None)
        end: tuple[Any, ...] = rows, everything, self.lengths.to(choice.device)
        if (self.lengths == self.length).all():
            end = everything, everything, self.length  # a slice is written in half the time
        for layer, (key, value) in enumerate(self.candidates):
            self.keys[layer][end] = key[rows, :, choice]
            self.values[layer][end] = value[rows, :, choice]
        self.candidates = []
        self.lengths = self.lengths + 1

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of rows `rows` [B'], in that order and as often as they occur, with their candidates."""
        keys, values = ([layer[rows] for layer in store] for store in (self.keys, self.values))
        candidates = [(key[rows], value[rows]) for key, value in self.candidates]
        return KVCache(self.capacity, self.lengths[rows.cpu()], keys, values, candidates)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a pre-norm Transformer, and where models differ.

    With `checkpointing`, training keeps only each layer's input and computes the rest again in the backward pass: a
    third more time, a twentieth of the memory (arXiv 1604.06174).
    """

    dim: int  # width
    depth: int  # number of layers
    heads: int  # attention heads; must divide `dim`
    mlp_ratio: float = 4.0  # hidden width of the feed-forward layers, as a multiple of `dim`
    parallel: bool = False  # attention and feed-forward layer read the same norm, and both are added to the input
    qk_norm: bool = False  # layer norms over the head's width on queries and keys, shared by all heads of a layer
    gelu: Literal["none", "tanh"] = "none"  # exact or by tanh
    checkpointing: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"Transformer width dim={self.dim} is not a multiple of heads={self.heads}")

    def saved_bytes(self, positions: int, size: int) -> float:
        """Estimate what a training pass over some positions keeps for the backward pass, `size` bytes a number.

        A layer keeps, in widths: its input and norm (2), queries, keys, values before and after norm and rotation (7),
        keys and values beside the prompt's (2), what is attended to in two layouts (2), and the feed-forward layer's
        hidden states before and after its activation. With checkpointing only one layer has all that.
        """
        layer = (13 + 2 * self.mlp_ratio) * self.dim
        widths = layer + self.depth * self.dim if self.checkpointing else self.depth * layer
        return positions * widths * size

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, allowed: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, q [B, heads, S, head_dim], k and v [B, heads, K, head_dim].

    `allowed` are the keys that a query may attend to, bool [B, 1, S or 1, K]; with `causal`, those of its own position
    and before. In training on CPUs plain matrix products are up to three times as fast as the fused kernel.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(config.head_dim) if config.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor, layer: int, attending: AttentionFn) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attending(layer, self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward layer with layer norms before and residual connections around them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = None if config.parallel else nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, hidden), nn.GELU(approximate=config.gelu), nn.Linear(hidden, config.dim)
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

    def forward(self, x: Tensor, causal: bool, cache: KVCache | None = None) -> list[Tensor]:
        """Full pass over x [B, S, dim], whose positions attend to one another; it fills the cache, if any."""

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                cache.prefill(k, v)
            return attend(q, k, v, causal)

        return self.run(x, attention)

    def step(self, x: Tensor, cache: KVCache) -> list[Tensor]:
        """One position: each of k alternatives x [B, k, dim] attends to the cached prefix and to itself."""
        cache.candidates = []  # others may have been proposed for the same position
        length = cache.length
        unfilled = torch.arange(length) >= cache.lengths[:, None, None, None]  # [B, 1, 1, length]
        masked = unfilled.to(x.device) if unfilled.any() else None

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.candidates.append((k, v))
            q = q * q.shape[-1] ** -0.5
            prefix = q @ cache.keys[layer][:, :, :length].transpose(2, 3)  # [B, heads, k, length]
            if masked is not None:
                prefix = prefix.masked_fill(masked, -torch.inf)
            weights = torch.cat([prefix, (q * k).sum(-1, keepdim=True)], dim=-1).softmax(-1)
            return weights[..., :-1] @ cache.values[layer][:, :, :length] + weights[..., -1:] * v

        return self.run(x, attention)

    def extend(self, x: Tensor, counts: Tensor, cache: KVCache) -> list[Tensor]:
        """The next positions of each row attend to the cached prefix and to those before them, and join the cache.

        Of row b of x [B, S, dim] the first counts[b] are read, the others are padding; counts [B] are on the CPU.
        """
        cache.candidates = []
        cache.reserve(int((cache.lengths + counts).max()))
        offset, rows = torch.arange(x.shape[1]), torch.arange(len(x), device=x.device)[:, None]
        positions = torch.where(offset < counts[:, None], cache.lengths[:, None] + offset, cache.room).to(x.device)
        cache.lengths = cache.lengths + counts
        length = cache.length
        allowed = torch.arange(length, device=x.device) <= positions[:, None, :, None]

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[rows, :, positions], values[rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
            return attend(q, keys[:, :, :length], values[:, :, :length], allowed=allowed)

        return self.run(x, attention)
