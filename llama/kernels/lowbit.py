"""Products with a packed weight: `lowbit_linear`, its kernel layout, and the PyTorch twins that define both.

The kernel layout is the published one with rows interleaved, 16 at a time, so that a register holds the same columns of
16 rows: field after field, each ordered (tile, block, unit, row, bytes of the unit), largest field first, the last
tile filled with zero rows. It has the same bytes as the published layout, and `from_tiles` restores that exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import library
from llama.kernels.bits import pack_bits, unpack_bits
from llama.kernels.formats import FORMATS, Field, LowBitFormat

TILE = 16  # rows that lie side by side in the kernel layout: the 32-bit lanes of a 512-bit register
STANDS_OUT = 2  # times the row's mean: so large is the peak of a block that is rounded twice
TILES_AT_ONCE = 64  # rows are put back 1024 at a time, so that temporaries stay small

_lowbit_linear, _lowbit_rows, _to_tiles = map(library.operator, ("lowbit_linear", "lowbit_rows", "to_tiles"))


def variants() -> list[str]:
    """The ways of computing that this machine can run, best first; empty where nothing was compiled.

    "avx512_vnni", "avx2" and "scalar" round the activations to int8, as `round_activations` says. "tiles" rounds
    nothing: it turns some hundred weight rows at a time into x's dtype for a matrix product.
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
    rounded = x.float() if variant == "tiles" else round_activations(x.float(), form)
    return F.linear(rounded, weight, bias).to(x.dtype)


def lowbit_rows(table: Tensor, rows: Tensor, form: LowBitFormat) -> Tensor:
    """Rows (n,) int64 of a table in the published layout, uint8 (rows, bytes), as numbers: float32 (n, columns).

    Bit for bit what the format says, by whatever way.
    """
    if _lowbit_rows is not None and table.is_cpu and form.levels is None and form.name in library.formats():
        return _lowbit_rows(table, rows, form.name, field_numbers(form))
    return form.dequantize(table.index_select(0, rows))


if _lowbit_rows is not None:

    @torch.library.register_fake("llama::lowbit_rows")
    def _(table: Tensor, rows: Tensor, format: str, fields: Sequence[int]) -> Tensor:
        form = FORMATS[format]
        columns = table.shape[1] // form.block_bytes * form.block
        return table.new_empty((rows.shape[0], columns), dtype=torch.float32)


def round_activations(x: Tensor, form: LowBitFormat) -> Tensor:
    """float32 (rows, columns) as the integer kernels see it: rounded to 255 even steps within each group of columns,
    the largest magnitude kept. Of a block that stands out, whose groups' peaks sum to more than `STANDS_OUT` times the
    mean of the row's blocks, what that leaves is rounded in the same way and added."""
    groups = x.unflatten(-1, (-1, form.rounded))
    whole = rounded(groups)
    blocks = groups.abs().amax(dim=-1).unflatten(-1, (-1, form.block // form.rounded)).sum(dim=-1)
    stands_out = blocks > STANDS_OUT * blocks.mean(dim=-1, keepdim=True)
    rest = stands_out.repeat_interleave(form.block // form.rounded, dim=-1).unsqueeze(-1)
    return (whole + torch.where(rest, rounded(groups - whole), 0)).flatten(-2)


def rounded(groups: Tensor) -> Tensor:
    """The last dimension to 255 even steps; what is too small to divide by, to 0."""
    peak = groups.abs().amax(dim=-1, keepdim=True)
    codes = (groups * torch.where(peak > 1e-30, 127 / peak, 0)).round()
    return codes * torch.where(peak <= 1e-30, 0, peak / 127)


def to_tiles(parts: Sequence[Tensor], form: LowBitFormat) -> Tensor:
    """Matrices in the published layout, uint8 (rows, bytes), one below the other -> the kernel layout, uint8 flat.

    By the compiled operator, in one thread up to some megabytes: models load while other threads are at work.
    """
    return _to_tiles(parts, field_numbers(form), form.block_bytes)


def to_tiles_twin(packed: Tensor, form: LowBitFormat) -> Tensor:
    """The same of one matrix, by PyTorch's operators."""
    filled = F.pad(packed, (0, 0, 0, -packed.shape[0] % TILE))
    out = filled.new_empty(filled.numel())
    rows = filled.view(-1, TILE, packed.shape[1] // form.block_bytes, form.block_bytes)
    for field, start, region in regions(form, out, rows.shape[0], rows.shape[2]):
        source = rows[..., start : start + field.size]
        if field.bit_planes:
            source = to_planes(source)
        region.copy_(source.unflatten(-1, (-1, field.unit)).permute(0, 2, 3, 1, 4))
    return out


def from_tiles(
    interleaved: Tensor, form: LowBitFormat, outputs: int, columns: int, rows: slice = slice(None)
) -> Tensor:
    """The inverse of `to_tiles_twin`: uint8 flat -> uint8 (outputs, bytes), or some rows of it."""
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


def in_kernel_order(form: LowBitFormat) -> list[tuple[Field, int]]:
    """The fields, and where each starts in a published block."""
    starts = accumulate((field.size for field in form.fields), initial=0)
    return sorted(zip(form.fields, starts, strict=False), key=lambda place: -place[0].size)


@cache
def field_numbers(form: LowBitFormat) -> list[int]:
    """The fields as the compiled operators take them: of each its start, its size, its unit, whether bits move."""
    fields = [(start, field.size, field.unit, int(field.bit_planes)) for field, start in in_kernel_order(form)]
    return list(chain.from_iterable(fields))


def regions(form: LowBitFormat, flat: Tensor, tiles: int, blocks: int) -> Iterator[tuple[Field, int, Tensor]]:
    """Each field, where it starts in a published block, and its part of the kernel layout
    (tiles, blocks, units, TILE, bytes of a unit), a view."""
    position = 0
    for field, start in in_kernel_order(form):
        size = tiles * blocks * TILE * field.size
        region = flat[position : position + size].view(tiles, blocks, field.size // field.unit, TILE, field.unit)
        yield field, start, region
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
