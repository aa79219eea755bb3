"""Key/value storage, and what one layer sees of it in one step.

Attention makes one call on the cache, `attend(q, k, v)`: it stores the step's keys and values and lets each
request's rows look at that request's own. Where they lie is the cache's business alone: a request owns a list of
*extents*, contiguous runs of slots, and a slot holds the keys and values of one token. Keys and values are never
repeated for grouped heads, never gathered into a copy, never padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

Extent = tuple[int, int]  # (first slot, number of slots)

SHORT_CONTEXT = 256  # tokens up to which one row is fastest through one fused operator
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


@dataclass(frozen=True)
class CacheShape:
    """What one rank's cache stores for a token."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    sliding_window: int | None = None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * dtype.itemsize


def clip(extents: Sequence[Extent], start: int, stop: int) -> Iterator[Extent]:
    """The extents of positions start ... stop - 1 alone."""
    position = 0
    for slot, length in extents:
        low, high = max(start, position), min(stop, position + length)
        if low < high:
            yield slot + low - position, high - low
        position += length


def products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """rows (heads, n, head_dim) times keys (heads, length, head_dim): (heads, n, length).

    Libraries rearrange the right factor before they multiply; with few rows that must not be the keys.
    """
    if rows.shape[1] <= FEW_ROWS:
        return torch.bmm(keys, rows.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(rows, keys.transpose(1, 2))


class KVCache:
    """A pool of slots for every layer: keys and values, each (n_kv_heads, num_slots, head_dim).

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
        self.fixed_rows = fixed_rows
        size = (shape.n_layers, shape.n_kv_heads, num_slots, shape.head_dim)
        self.keys = torch.empty(size, device=device, dtype=dtype)
        self.values = torch.empty(size, device=device, dtype=dtype)

    def layers(self, spans: Sequence[Span]) -> list[LayerCache]:
        """Each layer's view of the cache for a step made of `spans`."""
        runs = (
            range(slot, slot + length)
            for span in spans
            for slot, length in clip(span.extents, span.context - span.num_rows, span.context)
        )
        slots = torch.tensor(list(chain.from_iterable(runs)), device=self.keys.device)
        window = self.shape.sliding_window
        return [
            LayerCache(keys, values, slots, tuple(spans), window, self.fixed_rows)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies `length` slots of every layer."""
        for stored in (self.keys, self.values):
            stored[:, :, target : target + length] = stored[:, :, source : source + length]


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
        self.keys, self.values = (self._grown(stored, capacity) for stored in (self.keys, self.values))
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

    keys: torch.Tensor  # (n_kv_heads, num_slots, head_dim)
    values: torch.Tensor
    slots: torch.Tensor  # (num_tokens,) int64: where this step's tokens are stored
    spans: tuple[Span, ...]
    sliding_window: int | None
    fixed_rows: int | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k, v (num_tokens, n_kv_heads, head_dim); q and the result are (num_tokens, heads, head_dim)."""
        self.keys.index_copy_(1, self.slots, k.transpose(0, 1))
        self.values.index_copy_(1, self.slots, v.transpose(0, 1))
        parts = [self._attend(q[s.first_row : s.first_row + s.num_rows], s) for s in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q: torch.Tensor, span: Span) -> torch.Tensor:
        if self.fixed_rows is not None:
            return self._attend_fixed(q, span, self.fixed_rows)
        if span.num_rows == 1:
            return self._attend_row(
                q, list(clip(span.extents, self._first_seen(span.context - 1), span.context))
            )
        return self._attend_tiles(q, span)

    def _attend_row(self, q: torch.Tensor, extents: list[Extent]) -> torch.Tensor:
        """One row, in as few operators as can be: this runs for every request in every layer of every step.

        q (1, heads, head_dim). The heads that share a key head are handled as rows of it, so that each key is read
        once for all of them.
        """
        grouped = q.view(self.keys.shape[0], -1, q.shape[-1])  # (n_kv_heads, group, head_dim)
        slot, length = extents[0]
        if len(extents) == 1 and length <= SHORT_CONTEXT and q.device.type == "cpu":
            out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                grouped.unsqueeze(0),
                self.keys[:, slot : slot + length].unsqueeze(0),
                self.values[:, slot : slot + length].unsqueeze(0),
            )
            return out.view(q.shape)
        parts = [torch.bmm(self.keys[:, s : s + n], grouped.transpose(1, 2)) for s, n in extents]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (n_kv_heads, length, group)
        weights = scores.mul_(q.shape[-1] ** -0.5).transpose(1, 2).softmax(-1)
        if len(extents) == 1:
            return torch.bmm(weights, self.values[:, slot : slot + length]).view(q.shape)
        pieces = zip(weights.split([n for _, n in extents], dim=-1), extents, strict=True)
        return sum(torch.bmm(w, self.values[:, s : s + n]) for w, (s, n) in pieces).view(q.shape)

    def _attend_tiles(self, q: torch.Tensor, span: Span) -> torch.Tensor:
        """Rows in tiles; a tile's scores over all extents stand side by side and go through one softmax.

        q (num_rows, heads, head_dim). Scores have the model's dtype, as in the reference; the softmax computes
        in float32.
        """
        num_rows, heads, head_dim = q.shape
        grouped = q.unflatten(1, (self.keys.shape[0], -1)).permute(
            1, 2, 0, 3
        )  # (kv, group, num_rows, head_dim)
        out = torch.empty_like(q)
        tile = max(1, min(TILE_ROWS, TILE_SCORES // (heads * span.context)))
        for first in range(0, num_rows, tile):
            last = min(first + tile, num_rows)
            start = span.context - num_rows + first  # the position of the tile's first row
            seen = range(self._first_seen(start), start + last - first)
            extents = list(clip(span.extents, seen.start, seen.stop))
            rows = grouped[:, :, first:last].flatten(1, 2)  # (kv, group * rows, head_dim)
            parts = [products(rows, self.keys[:, s : s + n]) for s, n in extents]
            scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            scores = scores.mul_(head_dim**-0.5).unflatten(1, (-1, last - first))
            scores[..., first - last :] += self._causal(last - first, scores)
            if self._first_seen(seen.stop - 1) > seen.start:
                scores += self._window(start, seen, scores)
            weights = scores.softmax(-1).flatten(1, 2).split([n for _, n in extents], dim=-1)
            mixed = sum(
                torch.bmm(w, self.values[:, s : s + n]) for w, (s, n) in zip(weights, extents, strict=True)
            )
            out[first:last] = mixed.unflatten(1, (-1, last - first)).permute(2, 0, 1, 3).flatten(1, 2)
        return out

    def _attend_fixed(self, q: torch.Tensor, span: Span, size: int) -> torch.Tensor:
        """Rows in tiles of `size` positions, each computed whole even if the step has only one row of it.

        Every product then has a shape that depends on the row's position alone, and oneDNN and MKL give a row of
        a product the same bits wherever it stands and whatever the other rows hold. Several extents are joined
        in a copy. q (num_rows, heads, head_dim).
        """
        heads, head_dim = q.shape[1:]
        out = torch.empty_like(q)
        start = span.context - span.num_rows
        for tile in range(start // size * size, span.context, size):
            first, last = max(tile, start), min(tile + size, span.context)
            for slot, length in clip(
                span.extents, last, tile + size
            ):  # a hidden token has weight 0, and 0 * NaN
                self.keys[:, slot : slot + length] = 0
                self.values[:, slot : slot + length] = 0
            rows = q.new_zeros(size, heads, head_dim)
            rows[first - tile : last - tile] = q[first - start : last - start]
            rows = rows.unflatten(1, (self.keys.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)
            seen = range(self._first_seen(tile), tile + size)
            extents = list(clip(span.extents, seen.start, seen.stop))
            keys = torch.cat([self.keys[:, s : s + n] for s, n in extents], dim=1)
            values = torch.cat([self.values[:, s : s + n] for s, n in extents], dim=1)
            scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(head_dim**-0.5).unflatten(1, (-1, size))
            scores[..., -size:] += self._causal(size, scores)
            if self.sliding_window is not None:
                scores += self._window(tile, seen, scores)
            mixed = torch.bmm(scores.softmax(-1).flatten(1, 2), values)
            mixed = mixed.unflatten(1, (-1, size)).permute(2, 0, 1, 3).flatten(1, 2)
            out[first - start : last - start] = mixed[first - tile : last - tile]
        return out

    def _first_seen(self, position: int) -> int:
        return 0 if self.sliding_window is None else max(0, position + 1 - self.sliding_window)

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
