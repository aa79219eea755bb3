"""How rows look at what the cache stores: one class a backend, chosen once a cache and planned once a step.

A layer makes one call, `attend(qkv, rotary)`: it rotates queries and keys, stores the step's keys and values and lets
each request's rows look at that request's own. Keys and values are never repeated for grouped heads and never padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llama.cache import Extent, KVCache, Span, Store, clip, first_seen
from llama.kernels import layer
from llama.kernels.attention import attend_rows, row_table
from llama.kernels.cuda import serves_gpu
from llama.kernels.library import serves
from llama.rotary import Rotary

if TYPE_CHECKING:
    from llama.kernels.cuda.attention import RowTiles

SHORT_SPAN = 512
"""Rows up to which a span goes through the compiled operator.

`benchmarks/attention.py`, one thread, contexts of 128, 512 and 2048, the operator's time over the tiles', for 2, 16, 64
and 512 rows. AMD EPYC (Zen 3, AVX2), float32: SmolLM2's shape 0.07 to 0.17, 0.23 to 0.47, 0.43 to 0.79, 0.59 to 0.79; a
model of 1.1B 0.14 to 0.42, 0.45 to 0.72, 0.41 to 0.66, 0.50 to 0.66. AMD EPYC (Zen 5, AVX512-BF16), bfloat16: 0.07 to
0.28, 0.24 to 0.78, 0.40 to 1.21, 0.91 to 1.29; 0.14 to 0.54, 0.41 to 1.23, 0.84 to 1.29, 1.05 to 1.31. But a
prompt whose layers are one operator because of it took 0.74 of its time (128 tokens), 0.62 (512) and 0.82 (2000).
"""
SHORT_SPAN_BESIDE_AMX = 16  # in bfloat16, which those tiles multiply much faster: where their fixed cost is paid
SHORT_SCORES = 1 << 20  # of one head; row by row, with 4096 tokens, 256 rows took 0.90 and 0.99, 512 rows 1.27 and 0.96
SHORT_CONTEXT = 4096
"""Tokens that rows see, up to which that holds. More left the processor's cache from row to row, and only a few rows
were faster one by one (4 rows at 8192 tokens: 0.82 and 0.85; 8 rows: 1.15 and 1.09; 16 rows: 1.54 and 1.47). 16 are a
token and the guesses behind it (`rows_alone`).
"""
LONG_CONTEXT_ROWS = 16
FEW_ROWS = 64  # up to which the keys are the left factor of the scores
TILE_ROWS = 128  # query rows whose scores exist at one time
TILE_SCORES = 1 << 24  # and the most scores that one tile may hold


class Backend(Protocol):
    """One way to rotate, store and attend: what all layers share of one step."""

    @classmethod
    def plan(cls, spans: Sequence[Span], slots: Tensor, window: int | None) -> Backend:
        """For a step of `spans`, stored at slots (num_tokens,) int64; with a sliding window of so many tokens."""

    def attend(self, qkv: Tensor, rotary: Rotary, keys: Store, values: Store) -> Tensor:
        """Rotates queries and keys, stores keys and values in a layer's, and lets each row look at its request's.

        qkv (num_tokens, query + key + value heads, head_dim), in that order and side by side. Returns
        (num_tokens, query heads, head_dim) in its dtype. Scores are scaled by head_dim ** -0.5.
        """


def choose_backend(
    cache: KVCache, dtype: torch.dtype, fixed_rows: int | None = None, group: int = 1
) -> Callable[[Sequence[Span], Tensor, int | None], Backend]:
    """The `plan` of the backend that serves `cache` best for a model that computes in `dtype`.

    With `fixed_rows` a row's bits depend on its own request and position alone (see `FixedRows`). `group` query heads
    share a key head, which tells how many rows a tile had best have on a GPU.
    """
    if fixed_rows is not None:
        return partial(FixedRows.plan, size=fixed_rows)
    head = torch.empty(0, cache.shape.head_dim, device=cache.device, dtype=dtype)
    if serves(head):
        return partial(CompiledRows.plan, short=short_span(dtype))
    if serves_gpu(head):
        return partial(Paged.plan, group=group)
    return Tiles.plan


def short_span(dtype: torch.dtype) -> int:
    """Rows up to which a span goes through the compiled operator, where a model computes in `dtype`."""
    has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    return SHORT_SPAN_BESIDE_AMX if has_amx and dtype == torch.bfloat16 else SHORT_SPAN


def rows_alone(device: torch.device, dtype: torch.dtype) -> Callable[[int], int]:
    """By how many tokens they see: rows of one request up to which each has the bits that it would have alone.

    In the compiled operator they do; tiles of a matrix product, large ones on a GPU, add in another order.
    """
    if device.type != "cpu":
        return lambda num_seen: LONG_CONTEXT_ROWS
    return partial(most_short, short_span(dtype))


def computes_layers(backend: Backend) -> bool:
    """Whether the operators for whole layers attend as it does: where its table names every row."""
    return layer.COMPILED and isinstance(backend, CompiledRows) and not backend.tiles.spans


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache, and how the step's rows look at it."""

    backend: Backend
    keys: Store
    values: Store

    def attend(self, qkv: Tensor, rotary: Rotary) -> Tensor:
        """See `Backend.attend`."""
        return self.backend.attend(qkv, rotary, self.keys, self.values)

    @property
    def computes_layers(self) -> bool:
        """Whether `compute_layer` serves the step."""
        return computes_layers(self.backend)

    def compute_layer(self, h: Tensor, operands: layer.LayerOperands, rotary: Rotary) -> Tensor:
        """All of a layer in one operator: see `compute_layer`."""
        keys, values, backend = self.keys, self.values, self.backend
        stored = (keys.numbers, values.numbers, keys.scales, values.scales)
        return layer.compute_layer(h, operands, rotary.cos, rotary.sin, backend.slots, *stored, backend.table)


@dataclass(frozen=True)
class StepCache:
    """All layers' parts of the cache, keys and values, and how the step's rows look at each of them."""

    backend: Backend
    layers: Sequence[tuple[Store, Store]]
    kept: layer.KeptStores | None = None  # the same, where the operator for all layers finds them

    @classmethod
    def of(cls, cache: KVCache, spans: Sequence[Span], plan: Callable[..., Backend]) -> StepCache:
        """For a step made of `spans`; `plan` is what `choose_backend` chose for the cache."""
        backend = plan(spans, cache.slots(spans), cache.shape.sliding_window)
        return cls(backend, cache.layers, cache.kept if computes_layers(backend) else None)

    def __iter__(self) -> Iterator[LayerCache]:
        return (LayerCache(self.backend, keys, values) for keys, values in self.layers)

    @property
    def computes_layers(self) -> bool:
        """Whether `compute_layers` serves the step."""
        return self.kept is not None

    def compute_layers(
        self, h: Tensor, layers: layer.KeptLayers, additions: layer.KeptAdditions | None, rotary: Rotary
    ) -> Tensor:
        """All layers in one operator: see `compute_layers`."""
        slots, table = self.backend.slots, self.backend.table
        return layer.compute_layers(h, layers, additions, self.kept, rotary.cos, rotary.sin, slots, table)


@dataclass(frozen=True)
class CompiledRows:
    """One compiled operator for all short spans of a step; longer ones in tiles.

    Rows that stand beside each other in its table are computed together, and each has the bits that it has alone.
    The operator stores every token before any row attends, so that rows of one request see those before them.
    """

    slots: Tensor
    table: Tensor  # what each row of a short span looks at, as `attend_rows` reads it
    tiles: Tiles  # the longer spans

    @classmethod
    def plan(cls, spans: Sequence[Span], slots: Tensor, window: int | None, short: int = 1) -> CompiledRows:
        """Spans of up to `short` rows are short."""
        rows = (
            (row, seen)
            for span in spans
            if is_short(span, short, window)
            for row, seen in enumerate(span.seen(window), span.first_row)
        )
        longer = [span for span in spans if not is_short(span, short, window)]
        return cls(slots, row_table(rows), Tiles(longer, slots, window))

    def attend(self, qkv: Tensor, rotary: Rotary, keys: Store, values: Store) -> Tensor:
        stored = (keys.numbers, values.numbers, keys.scales, values.scales)
        out = attend_rows(qkv, rotary.cos, rotary.sin, self.slots, *stored, self.table)
        if self.tiles.spans:
            self.tiles.look(rotary(qkv[:, : -2 * keys.num_heads]), keys, values, out)
        return out


@dataclass(frozen=True)
class Paged:
    """Triton's kernels on a GPU, which find a request's tokens by a table: one call for short spans, one for long."""

    slots: Tensor  # (num_tokens,) int64; -1: the row is none
    runs: Tensor  # where each run of a span's tokens begins, as `run_table` makes it
    short: RowTiles  # of short spans
    long: RowTiles
    window: int | None

    @property
    def is_decoding(self) -> bool:
        """Whether the step has one row of each of some requests."""
        return self.short.rows == 1 and len(self.short.tiles) == len(self.slots)

    def for_decoding(self, slots: Tensor, longest: int) -> Paged:
        """Of a decoding step in which all rows are none, with room for as many as `slots` and contexts up to `longest`
        tokens."""
        from llama.kernels.cuda import attention as gpu

        tiles = slots.new_zeros((len(slots), gpu.TILE_NUMBERS), dtype=torch.int32)
        runs = slots.new_zeros((len(slots), longest // gpu.RUN), dtype=torch.int32)
        return replace(self, slots=slots, runs=runs, short=replace(self.short, tiles=tiles, longest=longest))

    @classmethod
    def plan(cls, spans: Sequence[Span], slots: Tensor, window: int | None, group: int = 1) -> Paged:
        """`group`: how many query heads share a key head."""
        from llama.kernels.cuda import attention as gpu  # here, because Triton takes a moment to import

        runs = gpu.run_table([list(clip(span.extents, 0, span.context)) for span in spans])
        parts = [(span.first_row, span.num_rows, span.start, place) for place, span in enumerate(spans)]
        tiles = []
        for is_long in (False, True):
            chosen = [part for part in parts if (part[1] > gpu.LONG_SPAN) == is_long]
            rows = gpu.rows_of_tile(max((part[1] for part in chosen), default=1), group)
            tiles.append(gpu.RowTiles.of(chosen, rows).to(slots.device))
        return cls(slots, runs.to(slots.device), *tiles, window)

    def attend(self, qkv: Tensor, rotary: Rotary, keys: Store, values: Store) -> Tensor:
        from llama.kernels.cuda import attention as gpu

        stored = (keys.numbers, values.numbers, keys.scales, values.scales)
        q = gpu.store_rotated(qkv, rotary.cos, rotary.sin, self.slots, *stored)
        out = torch.empty_like(q)
        for tiles in (self.short, self.long):
            gpu.attend(q, *stored, tiles, self.runs, self.window, out)
        return out


@dataclass(frozen=True)
class Tiles:
    """PyTorch's operators, for any device and type: some rows of a request at a time.

    A tile's scores over all extents stand side by side and go through one softmax. They have the model's dtype, as
    in the reference; the softmax computes in float32.
    """

    spans: Sequence[Span]
    slots: Tensor
    window: int | None

    @classmethod
    def plan(cls, spans: Sequence[Span], slots: Tensor, window: int | None) -> Tiles:
        return cls(spans, slots, window)

    def attend(self, qkv: Tensor, rotary: Rotary, keys: Store, values: Store) -> Tensor:
        q = rotate_and_store(qkv, rotary, self.slots, keys, values)
        out = q.new_empty(q.shape)
        self.look(q, keys, values, out)
        return out

    def look(self, q: Tensor, keys: Store, values: Store, out: Tensor) -> None:
        """Fills the spans' rows of `out`, q and out (num_tokens, heads, head_dim); everything is stored already."""
        for span in self.spans:
            rows = slice(span.first_row, span.first_row + span.num_rows)
            if span.num_rows == 1:
                [extents] = span.seen(self.window)
                out[rows] = self._row(q[rows], extents, keys, values)
            else:
                self._span(q[rows], span, keys, values, out[rows])

    def _row(self, q: Tensor, extents: list[Extent], keys: Store, values: Store) -> Tensor:
        """One row, q (1, heads, head_dim), in as few operators as can be.

        The heads that share a key head are handled as rows of it, so that each key is read once for all of them.
        """
        grouped = q.reshape(keys.num_heads, -1, q.shape[-1])  # (n_kv_heads, group, head_dim)
        parts = [torch.bmm(keys.run(extent, q.dtype), grouped.transpose(1, 2)) for extent in extents]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (n_kv_heads, length, group)
        weights = scores.mul_(q.shape[-1] ** -0.5).transpose(1, 2).softmax(-1)
        return mix(weights, extents, values).view(q.shape)

    def _span(self, q: Tensor, span: Span, keys: Store, values: Store, out: Tensor) -> None:
        num_rows, heads, head_dim = q.shape
        grouped = group_heads(q, keys.num_heads)
        tile = max(1, min(TILE_ROWS, TILE_SCORES // (heads * span.context)))
        for first in range(0, num_rows, tile):
            last = min(first + tile, num_rows)
            start, stop = span.start + first, span.start + last  # the tile's positions
            seen = range(first_seen(start, self.window), stop)
            extents = list(clip(span.extents, seen.start, seen.stop))
            rows = grouped[:, :, first:last].flatten(1, 2)  # (n_kv_heads, group * rows, head_dim)
            parts = [products(rows, keys.run(extent, q.dtype)) for extent in extents]
            scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            scores = scores.mul_(head_dim**-0.5).unflatten(1, (-1, last - first))
            scores[..., first - last :] += causal(last - first, scores)
            if first_seen(stop - 1, self.window) > seen.start:
                scores += outside(self.window, start, seen, scores)
            out[first:last] = ungroup(mix(scores.softmax(-1).flatten(1, 2), extents, values), last - first)


@dataclass(frozen=True)
class FixedRows:
    """Tiles of `size` aligned positions, each computed whole even if the step has only one row of it.

    Every product then has a shape that depends on the row's position alone, and oneDNN and MKL give a row of a
    product the same bits wherever it stands and whatever the other rows hold. Several extents are joined in a copy.
    """

    spans: Sequence[Span]
    slots: Tensor
    window: int | None
    size: int

    @classmethod
    def plan(cls, spans: Sequence[Span], slots: Tensor, window: int | None, size: int = 16) -> FixedRows:
        return cls(spans, slots, window, size)

    def attend(self, qkv: Tensor, rotary: Rotary, keys: Store, values: Store) -> Tensor:
        q = rotate_and_store(qkv, rotary, self.slots, keys, values)
        out = q.new_empty(q.shape)
        for span in self.spans:
            for tile in range(span.start // self.size * self.size, span.context, self.size):
                first, last = max(tile, span.start), min(tile + self.size, span.context)
                for extent in clip(span.extents, last, tile + self.size):
                    keys.clear(extent)  # a hidden token has weight 0, and 0 * NaN is NaN
                    values.clear(extent)
                rows = slice(*(position - span.start + span.first_row for position in (first, last)))
                filled = q.new_zeros(self.size, *q.shape[1:])
                filled[first - tile : last - tile] = q[rows]
                out[rows] = self._tile(filled, span, tile, keys, values)[first - tile : last - tile]
        return out

    def _tile(self, q: Tensor, span: Span, start: int, keys: Store, values: Store) -> Tensor:
        """The positions from `start` on, q (size, heads, head_dim)."""
        seen = range(first_seen(start, self.window), start + self.size)
        extents = list(clip(span.extents, seen.start, seen.stop))
        seen_keys, seen_values = (
            torch.cat([store.run(extent, q.dtype) for extent in extents], dim=1) for store in (keys, values)
        )
        rows = group_heads(q, keys.num_heads).flatten(1, 2)
        scores = torch.bmm(rows, seen_keys.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
        scores = scores.unflatten(1, (-1, self.size))
        scores[..., -self.size :] += causal(self.size, scores)
        if self.window is not None:
            scores += outside(self.window, start, seen, scores)
        return ungroup(torch.bmm(scores.softmax(-1).flatten(1, 2), seen_values), self.size)


def is_short(span: Span, short: int, window: int | None) -> bool:
    """Whether a span goes through the compiled operator: up to `short` of them, fewer where they see many tokens."""
    return span.num_rows <= most_short(short, span.context - first_seen(span.start, window))


def most_short(short: int, num_seen: int) -> int:
    """Rows of a span that go through the compiled operator where they see so many tokens, of at most `short`."""
    return min(short, SHORT_SCORES // num_seen if num_seen <= SHORT_CONTEXT else LONG_CONTEXT_ROWS)


def rotate_and_store(qkv: Tensor, rotary: Rotary, slots: Tensor, keys: Store, values: Store) -> Tensor:
    """Stores a step's rotated keys and its values; returns its rotated queries, (num_tokens, heads, head_dim)."""
    q, k = rotary(qkv[:, : -keys.num_heads]).tensor_split((-keys.num_heads,), dim=1)
    keys.put(slots, k)
    values.put(slots, qkv[:, -keys.num_heads :])
    return q


def group_heads(q: Tensor, num_kv_heads: int) -> Tensor:
    """q (rows, heads, head_dim) as (n_kv_heads, group, rows, head_dim)."""
    return q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def ungroup(mixed: Tensor, num_rows: int) -> Tensor:
    """(n_kv_heads, group * rows, head_dim) as (rows, heads, head_dim)."""
    return mixed.unflatten(1, (-1, num_rows)).permute(2, 0, 1, 3).flatten(1, 2)


def products(rows: Tensor, keys: Tensor) -> Tensor:
    """rows (heads, n, head_dim) times keys (heads, length, head_dim): (heads, n, length).

    Libraries rearrange the right factor before they multiply; with few rows that must not be the keys.
    """
    if rows.shape[1] <= FEW_ROWS:
        return torch.bmm(keys, rows.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(rows, keys.transpose(1, 2))


def mix(weights: Tensor, extents: list[Extent], values: Store) -> Tensor:
    """weights (n_kv_heads, rows, length over all extents) times their values: (n_kv_heads, rows, head_dim)."""
    pieces = zip(weights.split([n for _, n in extents], dim=-1), extents, strict=True)
    return sum(torch.bmm(piece, values.run(extent, weights.dtype)) for piece, extent in pieces)


def causal(num_rows: int, like: Tensor) -> Tensor:
    """(num_rows, num_rows): -inf where the column's token comes after the row's."""
    return like.new_full((num_rows, num_rows), float("-inf")).triu_(1)


def outside(window: int, start: int, seen: range, like: Tensor) -> Tensor:
    """(rows, seen tokens): -inf where the token lies before the sliding window of the row, the first at `start`."""
    rows = torch.arange(start, seen.stop, device=like.device).unsqueeze(1)
    columns = torch.arange(seen.start, seen.stop, device=like.device)
    hidden = columns <= rows - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
