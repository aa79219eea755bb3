"""Products with a packed weight: `lowbit_linear`, its kernel layout, and the PyTorch twins that define both.

The kernel layout is the published one with rows interleaved, 16 at a time, so that a register holds the same columns of
16 rows: field after field, each ordered (tile, block, unit, row, bytes of the unit), largest field first, the last
tile filled with zero rows. It has the same bytes as the published layout, and `from_tiles` restores that exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import library
from llama.kernels.bits import pack_bits, unpack_bits
from llama.kernels.formats import FORMATS, Field, LowBitFormat

TILE = 16  # rows that lie side by side in the kernel layout: the 32-bit lanes of a 512-bit register
WORDS = {2: torch.int16, 4: torch.int32}  # by their bytes
TILES_AT_ONCE = 64  # rows are rearranged 1024 at a time, so that temporaries stay small

_lowbit_linear = library.operator("lowbit_linear")


def variants() -> list[str]:
    """The ways of computing that this machine can run, best first; empty where nothing was compiled.

    "avx512_vnni", "avx2" and "scalar" round the activations to int8, one scale for each `rounded` columns of the
    layout. "tiles" rounds nothing: it turns some hundred weight rows at a time into x's dtype for a matrix product.
    """
    return [*library.instruction_sets(), "tiles"] if library.AVAILABLE else []


def lowbit_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, outputs: int, variant: str = "auto"
) -> Tensor:
    """x @ weight.T + bias, on CPU, with the compiled kernels.

    x: (..., columns) bfloat16 or float32. packed: uint8, flat, as `to_tiles` makes it. bias: float32 (outputs,).
    Returns (..., outputs) in x's dtype. `variant`: one of `variants()`; "auto" is "tiles" for many rows on
    a processor with AMX, else the widest integer kernel, whose result for a row does not depend on the other rows.
    """
    return _lowbit_linear(x, packed, bias, format, outputs, variant)


if library.AVAILABLE:

    @torch.library.register_fake("llama::lowbit_linear")
    def _(x: Tensor, packed: Tensor, bias: Tensor | None, format: str, outputs: int, variant: str) -> Tensor:
        return x.new_empty((*x.shape[:-1], outputs))


def lowbit_linear_twin(
    x: Tensor, packed: Tensor, bias: Tensor | None, format: str, outputs: int, variant: str = "scalar"
) -> Tensor:
    """What `lowbit_linear` means, in PyTorch operators and float32; slow."""
    form = FORMATS[format]
    weight = form.dequantize(from_tiles(packed, form, outputs, x.shape[1]))
    rounded = x.float() if variant == "tiles" else round_activations(x.float(), form.rounded)
    return F.linear(rounded, weight, bias).to(x.dtype)


def round_activations(x: Tensor, group: int) -> Tensor:
    """float32 (rows, columns) rounded to 255 even steps within each group of columns, the largest magnitude kept."""
    groups = x.unflatten(-1, (-1, group))
    peak = groups.abs().amax(dim=-1, keepdim=True)
    codes = (groups * torch.where(peak > 1e-30, 127 / peak, 0)).round()
    return (codes * torch.where(peak <= 1e-30, 0, peak / 127)).flatten(-2)


def to_tiles(packed: Tensor, form: LowBitFormat) -> Tensor:
    """The published layout, uint8 (rows, bytes) -> the kernel layout, uint8 flat."""
    tiles = -(-packed.shape[0] // TILE)
    blocks = packed.shape[1] // form.block_bytes
    out = packed.new_empty(tiles * TILE * packed.shape[1])
    if library.AVAILABLE and out.device.type == "cpu":
        torch.ops.llama.ask_for_large_pages(out)
    for first in range(0, tiles, TILES_AT_ONCE):
        part = packed[first * TILE : (first + TILES_AT_ONCE) * TILE]
        if part.shape[0] % TILE or part.storage_offset() % max(WORDS):
            part = F.pad(part, (0, 0, 0, -part.shape[0] % TILE))
        part = part.view(-1, TILE, blocks, form.block_bytes)
        for field, start, region in regions(form, out, tiles, blocks):
            source = part[..., start : start + field.size]
            if field.bit_planes:
                source = to_planes(source)
            # A unit moves as one word where blocks keep it aligned: byte by byte took twice as long.
            aligned = start % field.unit == form.block_bytes % field.unit == 0
            word = WORDS.get(field.unit, torch.uint8) if aligned else torch.uint8
            units = source.view(word).unflatten(-1, (field.size // field.unit, -1))
            region[first : first + TILES_AT_ONCE].view(word).copy_(units.permute(0, 2, 3, 1, 4))
    return out


def from_tiles(
    interleaved: Tensor, form: LowBitFormat, outputs: int, columns: int, rows: slice = slice(None)
) -> Tensor:
    """The inverse of `to_tiles`: uint8 flat -> uint8 (outputs, bytes), or some rows of it."""
    tiles, blocks = -(-outputs // TILE), columns // form.block
    start, stop, _ = rows.indices(outputs)
    begin, end = start // TILE, -(-stop // TILE)
    out = interleaved.new_empty((end - begin, TILE, blocks, form.block_bytes))
    for first in range(begin, end, TILES_AT_ONCE):
        last = min(first + TILES_AT_ONCE, end)
        for field, place, region in regions(form, interleaved, tiles, blocks):
            source = region[first:last].permute(0, 3, 1, 2, 4).flatten(-2)
            if field.bit_planes:
                source = from_planes(source)
            out[first - begin : last - begin, ..., place : place + field.size] = source
    return out.view((end - begin) * TILE, -1)[start - begin * TILE : stop - begin * TILE]


def regions(form: LowBitFormat, flat: Tensor, tiles: int, blocks: int) -> Iterator[tuple[Field, int, Tensor]]:
    """Each field, where it starts in a published block, and its part of the kernel layout
    (tiles, blocks, units, TILE, bytes of a unit), a view."""
    starts, position = {}, 0
    for field in form.fields:
        starts[field.name] = position
        position += field.size
    position = 0
    for field in sorted(form.fields, key=lambda field: -field.size):
        size = tiles * blocks * TILE * field.size
        region = flat[position : position + size].view(tiles, blocks, field.size // field.unit, TILE, field.unit)
        yield field, starts[field.name], region
        position += size


def to_planes(bits: Tensor) -> Tensor:
    """One bit a column, uint8 (..., 4k), reordered in each 32 columns: byte c holds columns c, c + 4, ... c + 28.

    So four neighbouring columns have the same bit of four neighbouring bytes, where their codes also are."""
    columns = unpack_bits(bits.contiguous()).unflatten(-1, (-1, 8, 4))
    return pack_bits(columns.transpose(-1, -2).flatten(-2)).flatten(-2)


def from_planes(planes: Tensor) -> Tensor:
    """The inverse of `to_planes`."""
    columns = unpack_bits(planes.contiguous()).unflatten(-1, (-1, 4, 8))
    return pack_bits(columns.transpose(-1, -2).flatten(-2)).flatten(-2)
