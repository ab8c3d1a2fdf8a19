"""Keys and values that passes of a Transformer leave behind: of rows, and of prefixes that rows share."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_BLOCK = 4  # positions by which caches grow at least
STATIC_BLOCK = 64  # positions by which caches grow that compiled passes read
MANY = 128  # positions of keys and values that do not stay in the cache of a core


@dataclass
class SharedPrefix:
    """Keys and values of U prefixes, padded on the left. Each of R rows reads one of them; none has a copy.

    For matrix products the rows of a prefix stand together: U groups of as many rows as the largest has.
    """

    padding: Tensor  # positions of padding of each prefix, [U], on the CPU
    length: int  # positions of each, padding included, P
    rows: Tensor  # the prefix that each row reads, [R], on the CPU
    device: torch.device
    passed: Tensor  # the row that each prefix had in the pass that filled it, [U], on the CPU
    keys: list[Tensor] = field(default_factory=list)  # per layer, [U, heads, P, head_dim]
    values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        real = torch.arange(self.length) >= self.padding[:, None]
        self.masked = None if real.all() else ~real[:, None, None].to(self.device)  # bool [U, 1, 1, P]
        counts = self.rows.bincount(minlength=len(self.padding))
        self.largest = int(counts.max())
        order = self.rows.argsort(stable=True)
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self.rows[order]]
        places = torch.empty_like(order).scatter(0, order, self.rows[order] * self.largest + rank)
        slots = len(counts) * self.largest
        self.places, self.source = None, None  # of rows in the groups, [R]; rows of the groups, [U * largest]
        if not torch.equal(places, torch.arange(slots)):
            self.places = places.to(self.device)
            self.source = torch.zeros(slots, dtype=torch.int64).scatter(0, places, torch.arange(len(places)))
            self.source = self.source.to(self.device)

    def prefill(self, *layer: Tensor) -> None:
        """Add a layer's keys and values of the rows of a pass, [U', heads, P, head_dim]."""
        for store, each in zip((self.keys, self.values), layer, strict=True):
            store.append(each if len(each) == len(self.passed) else each[self.passed.to(self.device)])

    def _grouped(self, x: Tensor) -> Tensor:
        """[R, heads, S, D] -> [U, heads, largest * S, D]."""
        x = x if self.source is None else x[self.source]
        if self.largest == 1:
            return x
        return x.unflatten(0, (-1, self.largest)).transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor) -> Tensor:
        """[U, heads, largest * S, D] -> [R, heads, S, D]."""
        if self.largest > 1:
            x = x.unflatten(2, (self.largest, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.places is None else x[self.places]

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """Products [R, heads, S, P] of scaled queries [R, heads, S, head_dim] with the keys; -inf for padding."""
        products = self._grouped(q) @ self.keys[layer].transpose(2, 3)
        if self.masked is not None:
            products = products.masked_fill(self.masked, -torch.inf)
        return self._apart(products)

    def attended(self, layer: int, weights: Tensor) -> Tensor:
        """Sums [R, heads, S, head_dim] of values, weighted [R, heads, S, P]."""
        return self._apart(self._grouped(weights) @ self.values[layer])

    def select(self, rows: Tensor) -> "SharedPrefix":
        """The same prefixes for rows `rows` [R'], on the CPU."""
        return replace(self, rows=self.rows[rows])


@dataclass
class KVCache:
    """Keys and values of decoded prefixes, of different lengths, and of the candidates for their next positions.

    A prefix is stored once; candidates attend to it without copying it. `commit` takes one of them. What several rows
    begin with is `shared`: the pass that fills the cache then reads each prefix once, and no row holds any of it.
    """

    capacity: int  # positions that a row will have at most, so that memory is asked for once
    shared: SharedPrefix | None = None  # what comes before the positions of each row
    static: bool = False  # passes read whole blocks, large ones, so that compiled ones meet few shapes
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # of each row, [B], on the CPU
    keys: list[Tensor] = field(default_factory=list)  # per layer, [B, heads, room + 1, head_dim]; padding is put last
    values: list[Tensor] = field(default_factory=list)  # of the same shape; in memory see `_place`
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

    @property
    def block(self) -> int:
        """Positions by which it grows: moving it a sixteenth of its final length at a time costs little."""
        return STATIC_BLOCK if self.static else max(_BLOCK, self.capacity // 16)

    def reserve(self, length: int) -> None:
        """Make room for prefixes of some length, but never much more.

        On CPUs gaps between prefixes make reading up to four times as slow; to move them now and then takes less. A
        layer moves to memory that another one has left: to touch new memory takes longer than to copy.
        """
        if length <= self.room:
            return
        for layers, place in ((self.keys, self._place), (self.values, self._place_values)):
            for layer, filled in enumerate(layers):
                layers[layer] = place(filled, length)
                self._spare = filled.new_empty(0).set_(filled.untyped_storage())

    def _place(self, filled: Tensor, length: int, positions: int = 2) -> Tensor:
        """Copy keys [B, heads, S, head_dim] to memory for `length` positions, in blocks, and one for padding.

        Positions may stand in the last dimension as well.
        """
        shape = list(filled.shape)

        def sized(length: int) -> list[int]:
            shape[positions] = -(-length // self.block) * self.block + 1
            return shape

        size = math.prod(sized(length))
        if self._spare is None or len(self._spare) < size:
            self._spare = filled.new_empty(math.prod(sized(max(length, self.capacity))))
        room, self._spare = self._spare[:size].view(sized(length)), None
        there = filled.shape[positions]
        room.narrow(positions, 0, there).copy_(filled)
        # No attention goes to what is not filled, but 0 times what memory held may not be 0.
        room.narrow(positions, there, room.shape[positions] - there).zero_()
        return self._marked(room)

    def _place_values(self, filled: Tensor, length: int) -> Tensor:
        """The same for values. CPUs sum up many of them in two thirds of the time where positions are neighbours."""
        if filled.device.type != "cpu" or self.static or self.capacity < MANY:
            return self._place(filled, length)
        return self._place(filled.transpose(2, 3), length, positions=3).transpose(2, 3)

    def _marked(self, memory: Tensor) -> Tensor:
        """Memory of a layer; CUDA graphs read it where it is, where they would copy it before every pass."""
        if self.static:
            torch._dynamo.mark_static_address(memory, guard=False)
        return memory

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """Add a layer that begins with these keys and values, [B, heads, S, head_dim], or [U', ...] if shared."""
        if self.shared is not None:
            self.shared.prefill(key, value)
            key = value = key.new_empty(len(self.shared.rows), key.shape[1], 0, key.shape[3])
        self.lengths = torch.full((len(key),), key.shape[2])
        self.keys.append(self._place(key, max(key.shape[2], 1)))
        self.values.append(self._place_values(value, max(key.shape[2], 1)))

    def commit(self, choice: Tensor) -> None:
        """Append candidate `choice` [B] of each row to the prefix and forget the others."""
        self.reserve(self.length + 1)
        rows, everything = torch.arange(len(choice), device=choice.device), slice(None)
        end: tuple[Any, ...] = rows, everything, self.lengths.to(choice.device)
        if (self.lengths == self.length).all():
            end = everything, everything, self.length  # a slice is written in half the time
        for layer, (key, value) in enumerate(self.candidates):
            only = key.shape[2] == 1
            self.keys[layer][end] = key[:, :, 0] if only else key[rows, :, choice]
            self.values[layer][end] = value[:, :, 0] if only else value[rows, :, choice]
        self.candidates = []
        self.lengths = self.lengths + 1

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of rows `rows` [B'], in that order and as often as they occur, with their candidates."""
        keys = [self._marked(layer[rows]) for layer in self.keys]
        values = [self._marked(layer.mT[rows].mT if layer.stride(2) == 1 else layer[rows]) for layer in self.values]
        candidates = [(key[rows], value[rows]) for key, value in self.candidates]
        shared = self.shared and self.shared.select(rows.cpu())
        return KVCache(self.capacity, shared, self.static, self.lengths[rows.cpu()], keys, values, candidates)
