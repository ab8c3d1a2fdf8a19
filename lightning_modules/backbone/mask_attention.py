"""How prompts and image tokens of decoders of whole grids attend: text is causal, the image sees everything."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.attention import attend
from lightning_modules.backbone.rotary import Rotary


@dataclass
class Prefix:
    """Keys and values of G prompts, padded on the left; an `AttentionFn` in the pass over them, which fills it."""

    rotary: Rotary | None  # of its positions; the last token of every prompt is at position max_text
    real: Tensor | None  # bool [G, P], False for padding, which is never attended to; None: no padding
    keys: list[Tensor] = field(default_factory=list)  # per layer, [G, heads, P, head_dim]
    values: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if layer == len(self.keys):  # a checkpointed layer runs again in the backward pass
            self.keys.append(k)
            self.values.append(v)
        return attend(q, k, v, causal=self._allowed is None, allowed=self._allowed)

    @cached_property
    def _allowed(self) -> Tensor | None:
        """Keys that prompts of several lengths may attend to, bool [G, 1, P, P]; None: all that come before."""
        if self.real is None:
            return None
        length = self.real.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.real.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=self.real.device)  # padding must attend to something
        return (causal & (self.real[:, None] | itself))[:, None]

    def select(self, rows: Tensor) -> "Prefix":
        """Prompts `rows` [G'], in that order and as often as they occur."""
        keys, values = ([layer[rows] for layer in store] for store in (self.keys, self.values))
        return Prefix(self.rotary, None if self.real is None else self.real[rows], keys, values)


@dataclass
class Grid:
    """How the tokens of an image attend: to their own prompt and to each other."""

    rotary: Rotary | None  # None where no prefix has padding
    prefixes: Sequence[Prefix]  # each for an equal part of the rows; a prefix of one row serves its whole part

    def __post_init__(self) -> None:
        length = 0 if self.rotary is None else self.rotary.cos.shape[0]
        self.allowed: list[Tensor | None] = [  # keys that the rows of each prefix may attend to, bool [G, 1, 1, P + S]
            None if prefix.real is None else F.pad(prefix.real, (0, length), value=True)[:, None, None]
            for prefix in self.prefixes
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        rows = len(q) // len(self.prefixes)
        attended = []
        parts = (x.split(rows) for x in (q, k, v))
        for prefix, allowed, q_own, k_own, v_own in zip(self.prefixes, self.allowed, *parts, strict=True):
            keys = torch.cat([prefix.keys[layer].expand(rows, -1, -1, -1), k_own], dim=2)
            values = torch.cat([prefix.values[layer].expand(rows, -1, -1, -1), v_own], dim=2)
            attended.append(attend(q_own, keys, values, allowed=allowed))
        return torch.cat(attended)
