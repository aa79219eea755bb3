"""Where keys and values are stored; `attention.py` looks at them.

A request owns a list of *extents*, contiguous runs of slots, and a slot holds the keys and values of one token. Every
layer has tensors of its own: a layer's part is then an input like any other to what is compiled, exported or moved.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from llama.kernels.attention import store_rows
from llama.kernels.layer import KeptStores

Extent = tuple[int, int]  # (first slot, number of slots)


@dataclass(frozen=True)
class Span:
    """One request's rows in a packed step.

    Example: a request of 10 tokens of which 7 are stored runs its last 3 as rows 4, 5, 6 of the step:
    `Span(first_row=4, num_rows=3, context=10, extents=((64, 8), (16, 2)))`. Row 4 stands at position 7, is stored
    in slot 71 and sees slots 64-71; row 6 stands at position 9, is stored in slot 17 and sees everything.
    """

    first_row: int
    num_rows: int
    context: int  # the request's tokens once this step's are stored
    extents: tuple[Extent, ...]  # in the order of positions, for at least `context` tokens
    limit: int = 0  # tokens that the request may reach

    @property
    def start(self) -> int:
        """The position of the first row."""
        return self.context - self.num_rows

    def seen(self, window: int | None) -> Iterator[list[Extent]]:
        """What each row looks at, from the first row on."""
        begins = list(accumulate((length for _, length in self.extents), initial=0))  # positions
        for position in range(self.start, self.context):
            first = first_seen(position, window)
            begin, end = bisect_right(begins, first) - 1, bisect_right(begins, position)
            runs = list(self.extents[begin:end])
            runs[-1] = (runs[-1][0], position + 1 - begins[end - 1])
            skipped = first - begins[begin]
            runs[0] = (runs[0][0] + skipped, runs[0][1] - skipped)
            yield runs


@dataclass(frozen=True)
class CacheShape:
    """What one rank's cache stores for a token."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    sliding_window: int | None = None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return 2 * self.n_layers * self.n_kv_heads * (self.head_dim * dtype.itemsize + scale)


def clip(extents: Sequence[Extent], start: int, stop: int) -> Iterator[Extent]:
    """The extents of positions start ... stop - 1 alone."""
    position = 0
    for slot, length in extents:
        low, high = max(start, position), min(stop, position + length)
        if low < high:
            yield slot + low - position, high - low
        position += length


def first_seen(position: int, window: int | None) -> int:
    """The first position that the token at `position` looks at."""
    return 0 if window is None else max(0, position + 1 - window)


@dataclass(frozen=True)
class Store:
    """One layer's keys or values: `numbers` (n_kv_heads, num_slots, head_dim).

    Where the numbers are int8, `scales` (n_kv_heads, num_slots) float32 has what one step is worth.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def empty(cls, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Store:
        scales = torch.empty(size[:-1], device=device) if dtype == torch.int8 else None
        return cls(torch.empty(size, device=device, dtype=dtype), scales)

    @property
    def num_heads(self) -> int:
        return self.numbers.shape[0]

    def put(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Stores rows (num_tokens, n_kv_heads, head_dim) in `slots` (num_tokens,) int64."""
        store_rows(rows, slots, self.numbers, self.scales)

    def run(self, extent: Extent, dtype: torch.dtype) -> torch.Tensor:
        """(n_kv_heads, length, head_dim) in `dtype`: a view, or a copy of int8."""
        slot, length = extent
        numbers = self.numbers[:, slot : slot + length]
        if self.scales is None:
            return numbers
        return (numbers * self.scales[:, slot : slot + length].unsqueeze(-1)).to(dtype)

    def clear(self, extent: Extent) -> None:
        """Makes the slots zeros."""
        slot, length = extent
        self.numbers[:, slot : slot + length] = 0
        if self.scales is not None:
            self.scales[:, slot : slot + length] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies `length` slots."""
        for part in (self.numbers, self.scales):
            if part is not None:
                part[:, target : target + length] = part[:, source : source + length]


class KVCache:
    """A pool of slots for every layer: keys and values, in the model's dtype or in int8.

    The operating system gives memory to a slot when it is first written.
    """

    def __init__(self, shape: CacheShape, num_slots: int, device: torch.device, dtype: torch.dtype):
        self.shape = shape
        self.num_slots = num_slots
        self.device = device
        size = (shape.n_kv_heads, num_slots, shape.head_dim)
        self.layers = [
            (Store.empty(size, device, dtype), Store.empty(size, device, dtype)) for _ in range(shape.n_layers)
        ]
        """Keys and values of each layer."""
        self._kept: tuple[Sequence, KeptStores] | None = None  # of which layers

    @property
    def kept(self) -> KeptStores:
        """Its layers, as the compiled operator for all of them takes them."""
        if self._kept is None or self._kept[0] is not self.layers:
            keys, values = zip(*self.layers, strict=True)
            numbers = ([store.numbers for store in stores] for stores in (keys, values))
            scales = ([store.scales for store in stores if store.scales is not None] for stores in (keys, values))
            self._kept = self.layers, KeptStores(*numbers, *scales)
        return self._kept[1]

    def slots(self, spans: Sequence[Span]) -> torch.Tensor:
        """Where a step made of `spans` stores its tokens: (num_tokens,) int64."""
        extents = (extent for span in spans for extent in clip(span.extents, span.start, span.context))
        slots = [range(slot, slot + length) for slot, length in extents]
        return torch.tensor(list(chain.from_iterable(slots)), dtype=torch.int64, device=self.device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies `length` slots of every layer."""
        for store in chain.from_iterable(self.layers):
            store.copy(source, target, length)


class ContiguousCache(KVCache):
    """A cache of `num_rows` requests that start together, each in one extent; it grows by doubling."""

    def __init__(self, shape: CacheShape, num_rows: int, device: torch.device, dtype: torch.dtype):
        super().__init__(shape, 0, device, dtype)
        self.num_rows = num_rows
        self._lengths = [0] * num_rows  # of what each row has stored

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.num_slots // self.num_rows

    def stored(self, num_rows: int) -> int:
        """Tokens that each of the first `num_rows` rows has stored; 0 where there are fewer rows."""
        return min(self._lengths[:num_rows], default=0) if num_rows <= self.num_rows else 0

    def keep(self, num_rows: int, length: int) -> None:
        """Notes that the first `num_rows` rows have stored `length` tokens or more."""
        self._lengths[:num_rows] = [max(stored, length) for stored in self._lengths[:num_rows]]

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every row; what is stored stays."""
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity, 64)
        self.layers = [(self._grown(keys, capacity), self._grown(values, capacity)) for keys, values in self.layers]
        self.num_slots = self.num_rows * capacity

    def _grown(self, store: Store, capacity: int) -> Store:
        stored = store.numbers.unflatten(1, (self.num_rows, self.capacity))
        grown = stored.new_empty(stored.shape[0], self.num_rows, capacity, stored.shape[-1])
        grown[:, :, : self.capacity] = stored
        return Store(grown.flatten(1, 2), None)

    def span(self, row: int, start_pos: int, seqlen: int) -> Span:
        """Row `row` of a (bsz, seqlen) step whose tokens begin at `start_pos`."""
        extent = (row * self.capacity, self.capacity)
        return Span(row * seqlen, seqlen, start_pos + seqlen, (extent,))
