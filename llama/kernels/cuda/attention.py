"""What a step does with the cache in every layer, on a GPU: rotate, store, attend, without a copy of keys or values.

A request's tokens are found by a table of where each run of RUN of them begins (paged attention: Kwon et al. 2023,
arXiv:2309.06180). Query rows are handled in tiles, each of one request and together with all heads that share a key
head, so that a key is read once for them; the softmax goes along the keys and never has all scores (FlashAttention-2:
Dao 2023, arXiv:2307.08691). Where tiles are few, a context is cut into pieces that are computed side by side and
then joined (Flash-Decoding: Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

RUN = 16  # tokens that lie side by side: the cache's block, or a part of it
KEYS_AT_ONCE = 64  # tokens that a program looks at in one turn
LONG_SPAN = 16  # rows of a request in a step up to which tiles are small: a token and guesses behind it
FEWEST_ROWS = 16  # of a product on the matrix units: query rows times heads of a group
MOST_TILE_ROWS = 128  # the same, of long spans
ATTENTION_PROGRAMS = 528  # to fill a large card: four for each of 132 multiprocessors
LARGE_TILE = 4  # as many programs count one that has a large tile
TOKENS_OF_PIECE = 256  # a shorter piece of a context is not worth a program
HEADS = 8  # that one program rotates and stores
TILE_NUMBERS = 4  # numbers of a tile: its first query row, how many it has, the first one's position, the row of `runs`
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off, it rounds a float32 to a whole number


@dataclass(frozen=True)
class RowTiles:
    """Query rows in pieces for one program each, on the host or on a device."""

    tiles: Tensor  # int32 (num_tiles, TILE_NUMBERS)
    rows: int  # query rows that a tile has room for
    longest: int  # tokens that any tile's last row sees

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, int, int]], rows: int) -> RowTiles:
        """spans: (first row, number of rows, position of the first, row of `runs`)."""
        tiles = [
            (first + done, min(rows, num - done), position + done, place)
            for first, num, position, place in spans
            for done in range(0, num, rows)
        ]
        longest = max((position + num for _, num, position, _ in tiles), default=0)
        return cls(torch.tensor(tiles, dtype=torch.int32).view(-1, TILE_NUMBERS), rows, longest)

    def to(self, device: torch.device) -> RowTiles:
        return replace(self, tiles=self.tiles.to(device))


def run_table(spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Each span's extents, (first slot, length), as where each of its runs of RUN tokens begins: int32 (spans, runs).

    An extent in front of another is whole runs. Behind a span's last run there is anything.
    """
    rows = []
    for extents in spans:
        if any(length % RUN for _, length in extents[:-1]):
            raise ValueError(f"extents {extents} are not whole runs of {RUN} tokens")
        parts = [np.arange(slot, slot + length, RUN, dtype=np.int32) for slot, length in extents]
        rows.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
    table = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return torch.from_numpy(table)


@triton.jit
def put(numbers, scales, place, there, x, column, columns, head_dim: tl.constexpr):
    """Stores x (HEADS, head_dim) float32 at the cache's rows `place` (HEADS,), in int8 where there are scales."""
    at = numbers + place[:, None] * head_dim + column[None, :]
    mask = there[:, None] & columns[None, :]
    if scales is None:
        tl.store(at, x.to(numbers.dtype.element_ty), mask=mask)
    else:
        worth = tl.max(tl.abs(x), axis=1) / 127
        steps = x / tl.maximum(worth, 1e-30)[:, None]
        steps = (steps + ROUNDING) - ROUNDING
        tl.store(at, steps.to(tl.int8), mask=mask)
        tl.store(scales + place, worth, mask=there)


@triton.jit
def store_rotated_kernel(
    qkv,  # (num_tokens, num_heads + 2 * kv_heads, head_dim), `stride` from token to token
    cos,  # (num_tokens, 1, head_dim) float32, as `rotate` takes them
    sin,
    slots,  # int64 (num_tokens,); -1: the row is none
    q,  # (num_tokens, num_heads, head_dim): rotated queries
    keys,  # (kv_heads, num_slots, head_dim)
    values,
    key_scales,  # float32 (kv_heads, num_slots) or None
    value_scales,
    stride,
    num_slots,
    num_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    WIDTH: tl.constexpr,  # head_dim, filled up to a power of two
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    columns = column < head_dim
    mask = (head < num_heads + 2 * kv_heads)[:, None] & columns[None, :]
    start = qkv + token * stride + head[:, None] * head_dim
    x = tl.load(start + column[None, :], mask=mask, other=0).to(tl.float32)
    other = tl.load(start + (column ^ 1)[None, :], mask=mask, other=0).to(tl.float32)  # of the pair
    c = tl.load(cos + token * head_dim + column, mask=columns, other=0)[None, :]
    s = tl.load(sin + token * head_dim + column, mask=columns, other=0)[None, :]
    # to the type of the queries and back: int8 is rounded from what would be stored otherwise
    rotated = (x * c + other * s).to(q.dtype.element_ty)

    at = q + (token * num_heads + head[:, None]) * head_dim + column[None, :]
    tl.store(at, rotated, mask=(head < num_heads)[:, None] & columns[None, :])
    of_keys = head - num_heads
    there = (of_keys >= 0) & (of_keys < kv_heads) & (slot >= 0)
    place = of_keys.to(tl.int64) * num_slots + slot
    put(keys, key_scales, place, there, rotated.to(tl.float32), column, columns, head_dim)
    of_values = of_keys - kv_heads
    there = (of_values >= 0) & (of_values < kv_heads) & (slot >= 0)
    place = of_values.to(tl.int64) * num_slots + slot
    put(values, value_scales, place, there, x, column, columns, head_dim)


@triton.jit(do_not_specialize=["num_tokens", "runs_stride", "piece_tokens"])
def attend_kernel(
    q,  # (num_tokens, kv_heads * GROUP, head_dim)
    keys,  # (kv_heads, num_slots, head_dim)
    values,
    key_scales,  # float32 (kv_heads, num_slots) or None
    value_scales,
    tiles,  # int32 (num_tiles, 4)
    runs,  # int32 (spans, runs_stride)
    out,  # as q; where there are several pieces (pieces, num_tokens, heads, head_dim) float32
    peaks,  # float32 (pieces, num_tokens, heads): the largest score, in units of log2
    sums,  # the same: what the weights add up to
    num_slots,
    num_tokens,
    runs_stride,
    piece_tokens,  # of a context, a multiple of KEYS
    scale,  # head_dim ** -0.5 * log2(e)
    head_dim: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a row sees, 0: all
    JOINED: tl.constexpr,  # whether the pieces are joined later
    GROUP: tl.constexpr,  # query heads that share a key head
    PADDED: tl.constexpr,  # the same, filled up to a power of two
    ROWS: tl.constexpr,  # query rows of a tile
    WIDTH: tl.constexpr,  # head_dim, filled up to a power of two
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 4
    first_row, num_rows, position, span = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    kv_head = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    m = tl.arange(0, ROWS * PADDED)
    row, in_group = m // PADDED, m % PADDED
    rows = (row < num_rows) & (in_group < GROUP)
    at = position + row  # each row's own position
    column = tl.arange(0, WIDTH)
    columns = column < head_dim
    num_heads = tl.num_programs(1) * GROUP
    head = (first_row + row).to(tl.int64) * num_heads + kv_head * GROUP + in_group
    x = tl.load(q + head[:, None] * head_dim + column[None, :], mask=rows[:, None] & columns[None, :], other=0)

    start, stop = piece * piece_tokens, tl.minimum((piece + 1) * piece_tokens, position + num_rows)
    if WINDOW > 0:
        start = tl.maximum(start, tl.maximum(position + 1 - WINDOW, 0) // KEYS * KEYS)
    peak = tl.full((ROWS * PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS * PADDED,), tl.float32)
    mixed = tl.zeros((ROWS * PADDED, WIDTH), tl.float32)
    precision: tl.constexpr = "tf32x3" if x.dtype == tl.float32 else "ieee"
    keys += kv_head * num_slots * head_dim
    values += kv_head * num_slots * head_dim
    for first in range(start, stop, KEYS):
        n = first + tl.arange(0, KEYS)
        there = n < stop
        slot = tl.load(runs + span.to(tl.int64) * runs_stride + n // BLOCK, mask=there, other=0).to(tl.int64)
        slot += n % BLOCK
        place = slot[:, None] * head_dim + column[None, :]
        stored = there[:, None] & columns[None, :]
        k = tl.load(keys + place, mask=stored, other=0).to(x.dtype)
        scores = tl.dot(x, tl.trans(k), input_precision=precision) * scale
        if key_scales is not None:
            scores *= tl.load(key_scales + kv_head * num_slots + slot, mask=there, other=0)[None, :]
        seen = (n[None, :] <= at[:, None]) & there[None, :]
        if WINDOW > 0:
            seen &= n[None, :] > at[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(peak - base)
        total = total * kept + tl.sum(weights, axis=1)
        if value_scales is not None:
            weights *= tl.load(value_scales + kv_head * num_slots + slot, mask=there, other=0)[None, :]
        v = tl.load(values + place, mask=stored, other=0).to(x.dtype)
        mixed = tl.dot(weights.to(x.dtype), v, mixed * kept[:, None], input_precision=precision)
        peak = new_peak

    mask = rows[:, None] & columns[None, :]
    mixed /= tl.where(total > 0, total, 1.0)[:, None]
    if JOINED:
        head += piece.to(tl.int64) * num_tokens * num_heads
        tl.store(peaks + head, peak, mask=rows)
        tl.store(sums + head, total, mask=rows)
    tl.store(out + head[:, None] * head_dim + column[None, :], mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_pieces"])
def join_kernel(
    parts,  # float32 (pieces, num_tokens, heads, head_dim): each piece's mean
    peaks,  # float32 (pieces, num_tokens, heads)
    sums,
    tiles,
    out,  # (num_tokens, heads, head_dim)
    num_tokens,
    num_pieces,
    head_dim: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,  # num_pieces, filled up to a power of two
):
    """Joins the pieces of one row's context, for one head."""
    tile = tiles + tl.program_id(0) // ROWS * 4
    in_tile = tl.program_id(0) % ROWS
    if in_tile >= tl.load(tile + 1):
        return
    row = (tl.load(tile) + in_tile).to(tl.int64)
    num_heads = tl.num_programs(1)
    piece = tl.arange(0, PIECES)
    there = piece < num_pieces
    column = tl.arange(0, WIDTH)
    columns = column < head_dim
    at = (piece.to(tl.int64) * num_tokens + row) * num_heads + tl.program_id(1)
    peak = tl.load(peaks + at, mask=there, other=float("-inf"))
    share = tl.load(sums + at, mask=there, other=0) * tl.exp2(peak - tl.max(peak, axis=0))
    place = at[:, None] * head_dim + column[None, :]
    part = tl.load(parts + place, mask=(there & (share > 0))[:, None] & columns[None, :], other=0)
    mixed = tl.sum(part * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(out + (row * num_heads + tl.program_id(1)) * head_dim + column, mixed.to(out.dtype.element_ty), columns)


def store_rotated(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Stores a step's rotated keys and its values; returns its rotated queries, (num_tokens, heads, head_dim).

    Arguments are those of `kernels.attention.attend_rows`; rows whose slot is -1 are not stored.
    """
    num_tokens, heads, head_dim = qkv.shape
    kv_heads, num_slots = keys.shape[:2]
    q = qkv.new_empty(num_tokens, heads - 2 * kv_heads, head_dim)
    if num_tokens:
        store_rotated_kernel[(num_tokens, triton.cdiv(heads, HEADS))](
            qkv, cos, sin, slots, q, keys, values, key_scales, value_scales, qkv.stride(0), num_slots,
            num_heads=heads - 2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim,
            WIDTH=triton.next_power_of_2(head_dim), HEADS=HEADS,
        )  # fmt: skip
    return q


def rows_of_tile(num_rows: int, group: int) -> int:
    """How many query rows a tile has best for spans of up to so many, where `group` query heads share a key head."""
    padded = triton.next_power_of_2(group)
    fewest, most = max(1, FEWEST_ROWS // padded), max(1, MOST_TILE_ROWS // padded)
    return 1 if num_rows == 1 else fewest if num_rows <= LONG_SPAN else most


def cut(longest: int, num_programs: int) -> tuple[int, int]:
    """Into how many pieces of how many tokens contexts are cut where there are `num_programs` with one piece."""
    pieces = max(1, min(ATTENTION_PROGRAMS // num_programs, triton.cdiv(longest, TOKENS_OF_PIECE)))
    piece_tokens = max(KEYS_AT_ONCE, triton.cdiv(triton.cdiv(longest, pieces), KEYS_AT_ONCE) * KEYS_AT_ONCE)
    return max(1, triton.cdiv(longest, piece_tokens)), piece_tokens


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    tiles: RowTiles,
    runs: Tensor,
    window: int | None,
    out: Tensor,
) -> None:
    """Fills the tiles' rows of `out`, q and out (num_tokens, heads, head_dim); everything is stored already.

    keys, values (kv_heads, num_slots, head_dim) in q's dtype, or int8 with float32 scales (kv_heads, num_slots).
    tiles, and runs (what `run_table` makes), are on q's device. Scores are scaled by head_dim ** -0.5; they and the
    softmax are float32.
    """
    num_tokens, heads, head_dim = q.shape
    kv_heads, num_slots = keys.shape[:2]
    num_tiles = len(tiles.tiles)
    if not num_tiles:
        return
    group = heads // kv_heads
    width = max(16, triton.next_power_of_2(head_dim))
    padded = max(triton.next_power_of_2(group), FEWEST_ROWS // tiles.rows)
    is_large = tiles.rows * padded > 64
    pieces, piece_tokens = cut(tiles.longest, num_tiles * kv_heads * (LARGE_TILE if is_large else 1))
    parts, peaks, sums = out, None, None
    if pieces > 1:
        parts = q.new_empty((pieces, *q.shape), dtype=torch.float32)
        peaks, sums = q.new_empty((2, pieces, num_tokens, heads), dtype=torch.float32)
    attend_kernel[(num_tiles, kv_heads, pieces)](
        q, keys, values, key_scales, value_scales, tiles.tiles, runs, parts, peaks, sums,
        num_slots, num_tokens, runs.stride(0), piece_tokens, head_dim**-0.5 * 1.4426950408889634,
        head_dim=head_dim, WINDOW=window or 0, JOINED=pieces > 1, GROUP=group, PADDED=padded,
        ROWS=tiles.rows, WIDTH=width, KEYS=KEYS_AT_ONCE if q.itemsize * width <= 256 else KEYS_AT_ONCE // 2, BLOCK=RUN,
        num_warps=8 if is_large else 4, num_stages=2,
    )  # fmt: skip
    if pieces > 1:
        join_kernel[(num_tiles * tiles.rows, heads)](
            parts, peaks, sums, tiles.tiles, out, num_tokens, pieces,
            head_dim=head_dim, WIDTH=width, ROWS=tiles.rows, PIECES=triton.next_power_of_2(pieces),
        )  # fmt: skip
