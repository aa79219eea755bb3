"""Key/value storage, and what one layer sees of it in one step.

Attention makes one call on the cache, `attend(qkv, rotary)`: it rotates queries and keys, stores the step's keys and
values and lets each request's rows look at that request's own. Where they lie is the cache's business alone: a request
owns a list of *extents*, contiguous runs of slots, and a slot holds the keys and values of one token. Keys and values
are never repeated for grouped heads, never gathered into a copy, never padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from llama.kernels.attention import attend_rows, row_table, store_rows
from llama.kernels.library import serves
from llama.rotary import Rotary

Extent = tuple[int, int]  # (first slot, number of slots)

FEW_ROWS = 64  # up to which the keys are the left factor of the scores
TILE_ROWS = 128  # query rows whose scores exist at one time
TILE_SCORES = 1 << 24  # and the most scores that one tile may hold


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

    def seen(self, window: int | None) -> list[Extent]:
        """What the last row looks at."""
        return list(clip(self.extents, first_seen(self.context - 1, window), self.context))


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


def products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """rows (heads, n, head_dim) times keys (heads, length, head_dim): (heads, n, length).

    Libraries rearrange the right factor before they multiply; with few rows that must not be the keys.
    """
    if rows.shape[1] <= FEW_ROWS:
        return torch.bmm(keys, rows.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(rows, keys.transpose(1, 2))


@dataclass(frozen=True)
class Store:
    """Keys or values, of all layers or of one: `numbers` (..., n_kv_heads, num_slots, head_dim).

    Where the numbers are int8, `scales` (..., n_kv_heads, num_slots) float32 has what one step is worth.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def empty(cls, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Store:
        scales = torch.empty(size[:-1], device=device) if dtype == torch.int8 else None
        return cls(torch.empty(size, device=device, dtype=dtype), scales)

    def layers(self) -> list[Store]:
        numbers = self.numbers.unbind()
        scales = [None] * len(numbers) if self.scales is None else self.scales.unbind()
        return [Store(*layer) for layer in zip(numbers, scales, strict=True)]

    def put(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Stores rows (num_tokens, n_kv_heads, head_dim) of one layer in `slots` (num_tokens,) int64."""
        store_rows(rows, slots, self.numbers, self.scales)

    def run(self, extent: Extent, dtype: torch.dtype) -> torch.Tensor:
        """One layer's (n_kv_heads, length, head_dim) in `dtype`: a view, or a copy of int8."""
        slot, length = extent
        numbers = self.numbers[:, slot : slot + length]
        if self.scales is None:
            return numbers
        return (numbers * self.scales[:, slot : slot + length].unsqueeze(-1)).to(dtype)

    def clear(self, extent: Extent) -> None:
        """Makes one layer's slots zeros."""
        slot, length = extent
        self.numbers[:, slot : slot + length] = 0
        if self.scales is not None:
            self.scales[:, slot : slot + length] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies `length` slots of every layer."""
        self.numbers[:, :, target : target + length] = self.numbers[:, :, source : source + length]
        if self.scales is not None:
            self.scales[:, :, target : target + length] = self.scales[:, :, source : source + length]


class KVCache:
    """A pool of slots for every layer: keys and values, in the model's dtype or in int8.

    The operating system gives memory to a slot when it is first written. With `fixed_rows` (the block size)
    attention is computed in a way that gives a row the same bits whatever else runs.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
        fixed_rows: int | None = None,
    ):
        self.shape = shape
        self.num_slots = num_slots
        self.device = device
        self.fixed_rows = fixed_rows
        size = (shape.n_layers, shape.n_kv_heads, num_slots, shape.head_dim)
        self._keep(Store.empty(size, device, dtype), Store.empty(size, device, dtype))

    def _keep(self, keys: Store, values: Store) -> None:
        self.keys, self.values = keys, values
        self._layers = list(zip(keys.layers(), values.layers(), strict=True))

    def layers(self, spans: Sequence[Span]) -> list[LayerCache]:
        """Each layer's view of the cache for a step made of `spans`."""
        runs = (
            range(slot, slot + length)
            for span in spans
            for slot, length in clip(span.extents, span.context - span.num_rows, span.context)
        )
        slots = torch.tensor(list(chain.from_iterable(runs)), dtype=torch.int64, device=self.device)
        window = self.shape.sliding_window
        alone = tuple(span for span in spans if span.num_rows == 1 and self.fixed_rows is None)
        others = tuple(span for span in spans if span.num_rows > 1 or self.fixed_rows is not None)
        table = row_table((span.first_row, span.seen(window)) for span in alone)
        return [
            LayerCache(keys, values, slots, alone, others, table, window, self.fixed_rows)
            for keys, values in self._layers
        ]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies `length` slots of every layer."""
        self.keys.copy(source, target, length)
        self.values.copy(source, target, length)


class ContiguousCache(KVCache):
    """A cache of `num_rows` requests that start together, each in one extent; it grows by doubling."""

    def __init__(self, shape: CacheShape, num_rows: int, device: torch.device, dtype: torch.dtype):
        super().__init__(shape, 0, device, dtype)
        self.num_rows = num_rows

    @property
    def capacity(self) -> int:
        return self.num_slots // self.num_rows

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every row; what is stored stays."""
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity, 64)
        self._keep(*(Store(self._grown(store.numbers, capacity), None) for store in (self.keys, self.values)))
        self.num_slots = self.num_rows * capacity

    def _grown(self, stored: torch.Tensor, capacity: int) -> torch.Tensor:
        layers, heads, _, head_dim = stored.shape
        grown = stored.new_empty(layers, heads, self.num_rows, capacity, head_dim)
        grown[:, :, :, : self.capacity] = stored.unflatten(2, (self.num_rows, self.capacity))
        return grown.flatten(2, 3)

    def span(self, row: int, start_pos: int, seqlen: int) -> Span:
        """Row `row` of a (bsz, seqlen) step whose tokens begin at `start_pos`."""
        extent = (row * self.capacity, self.capacity)
        return Span(row * seqlen, seqlen, start_pos + seqlen, (extent,))


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache in one step."""

    keys: Store  # of one layer
    values: Store
    slots: torch.Tensor  # (num_tokens,) int64: where this step's tokens are stored
    alone: tuple[Span, ...]  # spans of one row, which `attend_rows` computes where it can
    others: tuple[Span, ...]  # those that are always computed by PyTorch's operators
    table: torch.Tensor  # of `alone`, as `attend_rows` reads it
    sliding_window: int | None
    fixed_rows: int | None = None

    def attend(self, qkv: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Rotates queries and keys, stores keys and values, and lets each row look at its own request's.

        qkv (num_tokens, query + key + value heads, head_dim), in that order and side by side. Returns
        (num_tokens, query heads, head_dim) in its dtype.
        """
        keys, values, num_heads = self.keys, self.values, self.num_heads
        if serves(qkv):
            stored = (keys.numbers, values.numbers, keys.scales, values.scales)
            out = attend_rows(qkv, rotary.cos, rotary.sin, self.slots, *stored, self.table)
            if not self.others:
                return out
            q, rest = rotary(qkv[:, : -2 * num_heads]), self.others
        else:
            q, k = rotary(qkv[:, :-num_heads]).tensor_split((-num_heads,), dim=1)
            keys.put(self.slots, k)
            values.put(self.slots, qkv[:, -num_heads:])
            out, rest = q.new_empty(q.shape), self.alone + self.others
        for span in rest:
            rows = slice(span.first_row, span.first_row + span.num_rows)
            self._attend(q[rows], span, out[rows])
        return out

    def _attend(self, q: torch.Tensor, span: Span, out: torch.Tensor) -> None:
        if self.fixed_rows is not None:
            self._attend_fixed(q, span, out, self.fixed_rows)
        elif span.num_rows == 1:
            out[:] = self._attend_row(q, span.seen(self.sliding_window))
        else:
            self._attend_tiles(q, span, out)

    def _attend_row(self, q: torch.Tensor, extents: list[Extent]) -> torch.Tensor:
        """One row where `attend_rows` does not serve, in as few operators as can be.

        q (1, heads, head_dim). The heads that share a key head are handled as rows of it, so that each key is read
        once for all of them.
        """
        grouped = q.reshape(self.num_heads, -1, q.shape[-1])  # (n_kv_heads, group, head_dim)
        parts = [torch.bmm(self.keys.run(e, q.dtype), grouped.transpose(1, 2)) for e in extents]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (n_kv_heads, length, group)
        weights = scores.mul_(q.shape[-1] ** -0.5).transpose(1, 2).softmax(-1)
        return self._mix(weights, extents).view(q.shape)

    def _mix(self, weights: torch.Tensor, extents: list[Extent]) -> torch.Tensor:
        """weights (n_kv_heads, rows, length over all extents) times their values: (n_kv_heads, rows, head_dim)"""
        pieces = zip(weights.split([n for _, n in extents], dim=-1), extents, strict=True)
        return sum(torch.bmm(piece, self.values.run(extent, weights.dtype)) for piece, extent in pieces)

    def _attend_tiles(self, q: torch.Tensor, span: Span, out: torch.Tensor) -> None:
        """Rows in tiles; a tile's scores over all extents stand side by side and go through one softmax.

        q (num_rows, heads, head_dim). Scores have the model's dtype, as in the reference; the softmax computes
        in float32.
        """
        num_rows, heads, head_dim = q.shape
        grouped = q.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0, 3)  # (kv, group, num_rows, head_dim)
        tile = max(1, min(TILE_ROWS, TILE_SCORES // (heads * span.context)))
        for first in range(0, num_rows, tile):
            last = min(first + tile, num_rows)
            start = span.context - num_rows + first  # the position of the tile's first row
            seen = range(self._first_seen(start), start + last - first)
            extents = list(clip(span.extents, seen.start, seen.stop))
            rows = grouped[:, :, first:last].flatten(1, 2)  # (kv, group * rows, head_dim)
            parts = [products(rows, self.keys.run(extent, q.dtype)) for extent in extents]
            scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            scores = scores.mul_(head_dim**-0.5).unflatten(1, (-1, last - first))
            scores[..., first - last :] += self._causal(last - first, scores)
            if self._first_seen(seen.stop - 1) > seen.start:
                scores += self._window(start, seen, scores)
            mixed = self._mix(scores.softmax(-1).flatten(1, 2), extents)
            out[first:last] = mixed.unflatten(1, (-1, last - first)).permute(2, 0, 1, 3).flatten(1, 2)

    def _attend_fixed(self, q: torch.Tensor, span: Span, out: torch.Tensor, size: int) -> None:
        """Rows in tiles of `size` positions, each computed whole even if the step has only one row of it.

        Every product then has a shape that depends on the row's position alone, and oneDNN and MKL give a row of
        a product the same bits wherever it stands and whatever the other rows hold. Several extents are joined
        in a copy. q (num_rows, heads, head_dim).
        """
        heads, head_dim = q.shape[1:]
        start = span.context - span.num_rows
        for tile in range(start // size * size, span.context, size):
            first, last = max(tile, start), min(tile + size, span.context)
            for extent in clip(
                span.extents, last, tile + size
            ):  # a hidden token has weight 0, and 0 * NaN is NaN
                self.keys.clear(extent)
                self.values.clear(extent)
            rows = q.new_zeros(size, heads, head_dim)
            rows[first - tile : last - tile] = q[first - start : last - start]
            rows = rows.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
            seen = range(self._first_seen(tile), tile + size)
            extents = list(clip(span.extents, seen.start, seen.stop))
            keys = torch.cat([self.keys.run(extent, q.dtype) for extent in extents], dim=1)
            values = torch.cat([self.values.run(extent, q.dtype) for extent in extents], dim=1)
            scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(head_dim**-0.5).unflatten(1, (-1, size))
            scores[..., -size:] += self._causal(size, scores)
            if self.sliding_window is not None:
                scores += self._window(tile, seen, scores)
            mixed = torch.bmm(scores.softmax(-1).flatten(1, 2), values)
            mixed = mixed.unflatten(1, (-1, size)).permute(2, 0, 1, 3).flatten(1, 2)
            out[first - start : last - start] = mixed[first - tile : last - tile]

    @property
    def num_heads(self) -> int:
        """Of keys and values."""
        return self.keys.numbers.shape[0]

    def _first_seen(self, position: int) -> int:
        return first_seen(position, self.sliding_window)

    @staticmethod
    def _causal(num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """(num_rows, num_rows): -inf where the column's token comes after the row's."""
        return like.new_full((num_rows, num_rows), float("-inf")).triu_(1)

    def _window(self, start: int, seen: range, like: torch.Tensor) -> torch.Tensor:
        """(rows, seen tokens): -inf where the token lies before the row's sliding window."""
        rows = torch.arange(start, seen.stop, device=like.device).unsqueeze(1)
        columns = torch.arange(seen.start, seen.stop, device=like.device)
        hidden = columns <= rows - self.sliding_window
        return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
