"""How the positions of a pass attend: to one another, to cached ones, and to prefixes that rows share."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.kv_cache import MANY, KVCache, SharedPrefix
from lightning_modules.backbone.rotary import Rotary

# How positions attend to one another, and to others whose keys and values the function holds: a layer's index, its
# queries, keys and values, [B, heads, S, head_dim] -> the attended values, of the same shape.
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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


class FullAttention:
    """Positions attend to one another, to all or to those before them, but not to padding; it fills a cache, if any.

    Args:
        causal: only to those before them.
        rotary: of the positions, if any.
        padding: positions of padding on the left of each row, [B], on the CPU; causal passes only.
        cache: filled with the keys and values.
    """

    def __init__(
        self, causal: bool, rotary: Rotary | None = None, padding: Tensor | None = None, cache: KVCache | None = None
    ) -> None:
        self.causal, self.rotary, self.cache = causal, rotary, cache
        self.padding = padding if padding is not None and padding.any() else None
        self._allowed: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if self.cache is not None:
            self.cache.prefill(k, v)
        if self.padding is None:
            return attend(q, k, v, self.causal)
        if self._allowed is None:
            self._allowed = causal_mask(self.padding, q.shape[2]).to(q.device)
        return attend(q, k, v, allowed=self._allowed)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of queries [B, heads, S, head_dim] with keys [B, heads, K, head_dim], [B, heads, S, K].

    On CPUs many keys times one query take two thirds of the time of the query times the keys.
    """
    if q.device.type == "cpu" and q.shape[2] == 1 and k.shape[2] >= MANY:
        return (k @ q.mT).mT
    return q @ k.mT


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Sums of values [B, heads, K, head_dim], weighted [B, heads, S, K]: [B, heads, S, head_dim]."""
    return (v.mT @ weights.mT).mT if v.stride(2) == 1 else weights @ v  # see `KVCache`


def causal_mask(padding: Tensor, length: int) -> Tensor:
    """Keys that each position of rows with padding [B] on the left may attend to, bool [B, 1, length, length]."""
    real = torch.arange(length) >= padding[:, None]
    itself = torch.eye(length, dtype=torch.bool)  # padding must attend to something
    return (torch.ones(length, length, dtype=torch.bool).tril() & (real[:, None] | itself))[:, None]


@dataclass
class StepAttention:
    """One position: each of k alternatives attends to the cached prefix and to itself.

    It takes from the cache what it reads, so that a compiled pass sees tensors alone.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int  # positions of the cache that are read
    unfilled: Tensor | None  # those of them that a row does not have, bool [B, 1, 1, length]
    shared: SharedPrefix | None
    rotary: Rotary | None
    candidates: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # see `KVCache`

    @staticmethod
    def of(cache: KVCache, rotary: Rotary | None, device: torch.device) -> "StepAttention":
        """Attend to what a cache holds, on some device."""
        length = cache.room if cache.static else cache.length
        unfilled = torch.arange(length) >= cache.lengths[:, None, None, None]
        masked = unfilled.to(device) if cache.static or unfilled.any() else None
        return StepAttention(cache.keys, cache.values, length, masked, cache.shared, rotary)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        self.candidates.append((k, v))
        q = q * q.shape[-1] ** -0.5
        own = _scores(q, self.keys[layer][:, :, : self.length])
        if self.unfilled is not None:
            own = own.masked_fill(self.unfilled, -torch.inf)
        scores = [own, (q * k).sum(-1, keepdim=True)]
        start = 0
        if self.shared is not None:
            scores.insert(0, self.shared.scores(layer, q))
            start = self.shared.length
        weights = torch.cat(scores, dim=-1).softmax(-1)
        attended = _weighted(weights[..., start:-1], self.values[layer][:, :, : self.length]) + weights[..., -1:] * v
        if self.shared is not None:
            attended = attended + self.shared.attended(layer, weights[..., :start])
        return attended


class ExtendAttention:
    """The next positions of each row attend to the cached prefix and to those before them, and join the cache.

    Args:
        cache: what they join.
        counts: how many positions of each row are read, [B], on the CPU; the others are padding.
        size: positions of a row in the pass, padding included.
        rotary: of the positions, if any.
        device: that of the pass.
    """

    def __init__(self, cache: KVCache, counts: Tensor, size: int, rotary: Rotary | None, device: torch.device) -> None:
        cache.reserve(int((cache.lengths + counts).max()))
        self.cache, self.rotary = cache, rotary
        offset, self._rows = torch.arange(size), torch.arange(len(counts), device=device)[:, None]
        positions = torch.where(offset < counts[:, None], cache.lengths[:, None] + offset, cache.room)
        self._positions = positions.to(device)
        cache.lengths = cache.lengths + counts
        self._length = cache.length
        self._allowed = torch.arange(self._length, device=device) <= self._positions[:, None, :, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        place = self._rows, slice(None), self._positions
        keys[place], values[place] = k.transpose(1, 2), v.transpose(1, 2)
        keys, values, shared = keys[:, :, : self._length], values[:, :, : self._length], self.cache.shared
        if shared is None:
            return attend(q, keys, values, allowed=self._allowed)
        q = q * q.shape[-1] ** -0.5
        own = (q @ keys.transpose(2, 3)).masked_fill(~self._allowed, -torch.inf)
        weights = torch.cat([shared.scores(layer, q), own], dim=-1).softmax(-1)
        own, prefix = weights[..., shared.length :], weights[..., : shared.length]
        return own @ values + shared.attended(layer, prefix)
