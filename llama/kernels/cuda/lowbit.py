"""Products with a packed weight on a GPU, in Triton: `packed_linear`, which reads a layout of its own.

`to_words` puts a field of all blocks side by side, so that a thread reads 16 bytes of codes at once wherever its row
begins. A row's code bytes are cut into chunks that share a scale, W bytes each, and a chunk is read as J words of four
bytes; a byte holds one code (PARTS = 1) or two whose columns are SPAN apart (PARTS = 2). The bytes of a chunk are
transposed: byte b of its words belongs to neighbouring columns, whose x a thread reads at once, too. Codes become
numbers in registers, for every format whose class says so, q4_k and q6_k included:

    one row       each thread keeps its own sums in float32, of codes first: a chunk's scale is applied to its sum
    up to FEW     a tile of weights is rounded to x's dtype for the matrix units, which sum in float32
    more rows     the weight is unpacked to x's dtype, some rows at a time, for the matrix library

Where the outputs alone give too few programs, the columns are split too, and the parts added in a fixed order. Tiles
are fixed rather than measured when first run: the same product has the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.formats import FORMATS, Field, LowBitFormat

PROGRAMS = 528  # to fill a large card: four for each of 132 multiprocessors,
SMALL_PROGRAMS = 1056  # or eight of one warp
FEW = 32  # rows up to which weights are unpacked in registers
MOST_UNPACKED = 1 << 27  # numbers that are unpacked into memory at one time
ONE = 0x3F800000  # the bits of 1.0: given to kernels, since and-or with two constants would be two instructions


@triton.jit
def number_of(words, planes, pairs, j, levels, one, part: tl.constexpr, b: tl.constexpr, J: tl.constexpr,
              BITS: tl.constexpr, FLIP: tl.constexpr):  # fmt: skip
    """What the code in byte b of each word stands for, before scale and minimum are applied: float32.

    Where codes are evenly spaced it is put below the point of 1.0, which makes 1 + code / 2 ** BITS of it: exact, and
    cheaper than a conversion.
    """
    if levels is not None:
        number = tl.load(levels + (words >> 8 * b + 4 * (part ^ FLIP) & 15))
    else:
        if BITS == 8:
            fraction = (words >> 8 * b & 255 ^ 128) << 15
        else:
            from_bit: tl.constexpr = 8 * b + 4 * (part ^ FLIP)
            to_bit: tl.constexpr = 23 - BITS
            if from_bit <= to_bit:
                fraction = words << to_bit - from_bit
            else:
                fraction = words >> from_bit - to_bit
            fraction = fraction & 15 << to_bit
        if BITS == 5:
            fraction |= (planes[:, :, None] >> b * J + j & 1) << 22
        if BITS == 6:
            fraction |= (pairs >> 8 * b + 4 * part & 3) << 21
        number = (fraction | one).to(tl.float32, bitcast=True)
    return number


@triton.jit
def scale_of(scales, minimums, zeros, steps, at, block, there, part: tl.constexpr, EVEN: tl.constexpr,
             BITS: tl.constexpr, OFFSET: tl.constexpr, STEP_BITS: tl.constexpr):  # fmt: skip
    """(factor, summand) that make a weight of what `number_of` gives, for chunk `at` of each block: (N, C) float32."""
    scale = tl.load(scales + block, mask=there, other=0).to(tl.float32)
    minimum = tl.zeros_like(scale)
    if minimums is not None:
        minimum = tl.load(minimums + block, mask=there, other=0).to(tl.float32)
    if zeros is not None:
        minimum = -scale * tl.load(zeros + block, mask=there, other=0).to(tl.float32)
    if STEP_BITS == 8:
        step = tl.load(steps + block * 16 + at // 4 * 8 + at % 4 + 4 * part, mask=there, other=0)
        scale *= step.to(tl.int8, bitcast=True).to(tl.float32)
    if STEP_BITS == 6:  # together for the first four groups, in two places for the others
        group = at * 2 + part
        low = steps + block * 12 + group % 4
        a = tl.load(low, mask=there, other=0).to(tl.int32)
        b = tl.load(low + 4, mask=there, other=0).to(tl.int32)
        rest = tl.load(low + 8, mask=there, other=0).to(tl.int32)
        scale *= tl.where(group < 4, a & 63, rest & 15 | a >> 6 << 4).to(tl.float32)
        minimum *= -tl.where(group < 4, b & 63, rest >> 4 | b >> 6 << 4).to(tl.float32)
    if EVEN:
        minimum -= (2**BITS + OFFSET) * scale
        scale *= 2**BITS
    return scale, minimum


@triton.jit
def chunks_of(words, highs, row, first, num_chunks, C: tl.constexpr, J: tl.constexpr, CHUNKS: tl.constexpr,
              BITS: tl.constexpr):  # fmt: skip
    """C chunks of each row (N,) from the chunk `first` on: their words (N, C, J), and for six bits the words that hold
    the upper two, shifted so that those of part 0 are in the lowest bits of each byte; whether there is such a chunk
    (1, C), its place in its block (1, C), and its block (N, C).
    """
    chunk = first + tl.arange(0, C)[None, :]
    there = chunk < num_chunks
    at = chunk % CHUNKS
    block = row[:, None] * (num_chunks // CHUNKS) + chunk // CHUNKS
    j = tl.arange(0, J)[None, None, :]
    place = (row[:, None] * num_chunks + chunk)[:, :, None] * J + j
    raw = tl.load(words + place, mask=there[:, :, None], other=0)
    pairs = raw
    if BITS == 6:
        place = (block * 16 + at // 4 * 8 + at % 2 * 4)[:, :, None] + j
        pairs = tl.load(highs + place, mask=there[:, :, None], other=0) >> (at % 4 // 2 * 2)[:, :, None]
    return raw, pairs, there, at, block


@triton.jit
def bit_planes_of(highs, block, there, part: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr):
    """For five bits: the upper ones of a chunk's codes, one bit a byte of it, (N, C) int32."""
    if BITS == 5:
        planes = tl.load(highs + block * PARTS + part, mask=there, other=0).to(tl.int32)
    else:
        planes = block  # nobody reads it
    return planes


@triton.jit
def columns_of(first, j, part: tl.constexpr, b: tl.constexpr, C: tl.constexpr, W: tl.constexpr, J: tl.constexpr,
               SPAN: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """The columns of byte b of the words of C chunks: (C, J)."""
    byte = (first + tl.arange(0, C)) * W
    return (byte // SPAN * (SPAN * PARTS) + byte % SPAN + part * SPAN + b * J)[:, None] + j


@triton.jit(do_not_specialize=["num_steps", "one"])
def row_kernel(
    x, words, highs, scales, minimums, zeros, steps, bias, levels, one, y, outputs, num_chunks, num_steps,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, J: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    CHUNKS: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, FLIP: tl.constexpr, STEP_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row: x (columns,), y (splits, outputs); num_steps of C chunks each, for one split."""
    split = tl.program_id(1)
    n = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.minimum(n, outputs - 1).to(tl.int64)  # rows beyond the last are copies of it, and not stored
    j = tl.arange(0, J)
    total = tl.zeros((N, C, J), tl.float32)
    for step in tl.range(num_steps, num_stages=STAGES):
        first = (split * num_steps + step) * C
        raw, pairs, there, at, block = chunks_of(words, highs, row, first, num_chunks, C, J, CHUNKS, BITS)
        there_x = (first + tl.arange(0, C) < num_chunks)[:, None]
        for part in tl.static_range(PARTS):
            if STEP_BITS > 0 or part == 0:  # else both parts of a byte have one scale
                factor, summand = scale_of(
                    scales, minimums, zeros, steps, at, block, there, part, levels is None, BITS, OFFSET, STEP_BITS
                )
            planes = bit_planes_of(highs, block, there, part, PARTS, BITS)
            codes = tl.zeros((N, C, J), tl.float32)
            sum_x = tl.zeros((C, J), tl.float32)
            for b in tl.static_range(4):
                column = columns_of(first, j[None, :], part, b, C, W, J, SPAN, PARTS)
                piece = tl.load(x + column, mask=there_x, other=0).to(tl.float32)
                number = number_of(raw, planes, pairs, j[None, None, :], levels, one, part, b, J, BITS, FLIP)
                codes += number * piece[None, :, :]
                sum_x += piece
            total += codes * factor[:, :, None] + sum_x[None, :, :] * summand[:, :, None]
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if bias is not None:
        result += tl.where(split == 0, tl.load(bias + n, mask=n < outputs, other=0), 0.0)
    tl.store(y + split.to(tl.int64) * outputs + n, result, mask=n < outputs)


@triton.jit(do_not_specialize=["num_steps", "rows", "one"])
def rows_kernel(
    x, words, highs, scales, minimums, zeros, steps, bias, levels, one, y, rows, outputs, num_chunks, num_steps,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, J: tl.constexpr, PARTS: tl.constexpr,
    SPAN: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, FLIP: tl.constexpr,
    STEP_BITS: tl.constexpr,
):  # fmt: skip
    """M rows: x (rows, columns), turned as `turn` does it, y (splits, rows, outputs)."""
    split = tl.program_id(2)
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(1) * M + tl.arange(0, M)
    row = tl.minimum(n, outputs - 1).to(tl.int64)
    x_rows = x + tl.minimum(m, rows - 1).to(tl.int64) * (num_chunks * W * PARTS)
    j = tl.arange(0, J)
    total = tl.zeros((N, M), tl.float32)
    # float32's product in three steps on the matrix units is as exact as that of ordinary units, and much faster
    precision: tl.constexpr = "tf32x3" if x.dtype.element_ty == tl.float32 else "ieee"
    for step in range(num_steps):
        first = (split * num_steps + step) * C
        raw, pairs, there, at, block = chunks_of(words, highs, row, first, num_chunks, C, J, CHUNKS, BITS)
        there_x = first * J + tl.arange(0, C * J) < num_chunks * J
        for part in tl.static_range(PARTS):
            if STEP_BITS > 0 or part == 0:  # else both parts of a byte have one scale
                factor, summand = scale_of(
                    scales, minimums, zeros, steps, at, block, there, part, levels is None, BITS, OFFSET, STEP_BITS
                )
            planes = bit_planes_of(highs, block, there, part, PARTS, BITS)
            for b in tl.static_range(4):
                place = ((part * 4 + b) * num_chunks + first) * J + tl.arange(0, C * J)
                piece = tl.load(x_rows[:, None] + place[None, :], mask=there_x[None, :], other=0)
                number = number_of(raw, planes, pairs, j[None, None, :], levels, one, part, b, J, BITS, FLIP)
                weight = number * factor[:, :, None] + summand[:, :, None]
                tile = tl.reshape(weight.to(x.dtype.element_ty), (N, C * J))
                total = tl.dot(tile, tl.trans(piece), total, input_precision=precision)
    if bias is not None:
        total += tl.where(split == 0, tl.load(bias + n, mask=n < outputs, other=0), 0.0)[:, None]
    place = (split * rows + m[None, :]).to(tl.int64) * outputs + n[:, None]
    tl.store(y + place, total, mask=(m[None, :] < rows) & (n[:, None] < outputs))


@triton.jit
def unpack_kernel(
    words, highs, scales, minimums, zeros, steps, levels, one, y, first_row, end_row, num_chunks,
    N: tl.constexpr, C: tl.constexpr, W: tl.constexpr, J: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    CHUNKS: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, FLIP: tl.constexpr, STEP_BITS: tl.constexpr,
):  # fmt: skip
    """Rows of the weight as numbers: y (end_row - first_row, columns)."""
    n = first_row + tl.program_id(0) * N + tl.arange(0, N)
    row = tl.minimum(n, end_row - 1).to(tl.int64)
    first = tl.program_id(1) * C
    j = tl.arange(0, J)
    raw, pairs, there, at, block = chunks_of(words, highs, row, first, num_chunks, C, J, CHUNKS, BITS)
    start = y + (row - first_row) * (num_chunks * W * PARTS)
    mask = ((n < end_row)[:, None] & there)[:, :, None]
    for part in tl.static_range(PARTS):
        if STEP_BITS > 0 or part == 0:  # else both parts of a byte have one scale
            factor, summand = scale_of(
                scales, minimums, zeros, steps, at, block, there, part, levels is None, BITS, OFFSET, STEP_BITS
            )
        planes = bit_planes_of(highs, block, there, part, PARTS, BITS)
        for b in tl.static_range(4):
            column = columns_of(first, j[None, :], part, b, C, W, J, SPAN, PARTS)
            number = number_of(raw, planes, pairs, j[None, None, :], levels, one, part, b, J, BITS, FLIP)
            weight = number * factor[:, :, None] + summand[:, :, None]
            tl.store(start[:, None, None] + column[None, :, :], weight.to(y.dtype.element_ty), mask=mask)


@cache
def constants(format: str) -> dict[str, int]:
    """What the kernels are compiled for: a format's numbers."""
    form = FORMATS[format]
    parts = 1 if form.bits == 8 else 2
    width = min(form.block // parts, form.group)
    return dict(
        BITS=form.bits,
        OFFSET=form.offset,
        PARTS=parts,
        FLIP=int(form.high_half_first),
        W=width,
        J=width // 4,
        SPAN=width if parts == 1 else form.span,
        CHUNKS=form.block // parts // width,
        STEP_BITS=form.step_bits,
    )


@cache
def levels_of(format: str, device: torch.device) -> Tensor | None:
    """A format's table on `device`, float32; None where its codes are evenly spaced."""
    levels = FORMATS[format].levels
    return None if levels is None else torch.tensor(levels, device=device)


# ---- the layout


@cache
def planes(form: LowBitFormat) -> tuple[Field, ...]:
    """The fields in the order of their planes: each begins at a multiple of its unit."""
    return tuple(sorted(form.fields, key=lambda field: (field.name != "codes", -field.unit)))


def turned(field: Field, form: LowBitFormat) -> int:
    """How many bytes of a field are transposed together, as four rows; 0: none."""
    if field.name == "codes":
        return constants(form.name)["W"]
    return 16 if field.name == "high" and form.bits == 6 else 0


def to_words(parts: Sequence[Tensor], form: LowBitFormat) -> Tensor:
    """A weight in parts, rows below rows in the published layout, as the kernels read it: uint8 of the same shape."""
    packed = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    blocks = packed.view(-1, form.block_bytes).split([field.size for field in form.fields], dim=1)
    of_field = dict(zip((field.name for field in form.fields), blocks, strict=True))
    flat = []
    for field in planes(form):
        plane = of_field[field.name]
        if width := turned(field, form):
            plane = plane.unflatten(1, (-1, 4, width // 4)).transpose(2, 3)
        flat.append(plane.flatten())
    return torch.cat(flat).view(packed.shape)


def split_planes(packed: Tensor, form: LowBitFormat) -> dict[str, Tensor]:
    """Each field of all blocks, flat uint8: views."""
    num_blocks = packed.numel() // form.block_bytes
    parts = packed.view(-1).split([num_blocks * field.size for field in planes(form)])
    return {field.name: part for field, part in zip(planes(form), parts, strict=True)}


def from_words(packed: Tensor, form: LowBitFormat, rows: slice = slice(None)) -> Tensor:
    """Rows of it in the published layout, uint8 (rows, bytes): a copy."""
    of_field = split_planes(packed, form)
    fields = []
    for field in form.fields:
        plane = of_field[field.name].view(len(packed), -1, field.size)[rows]
        if width := turned(field, form):
            plane = plane.unflatten(2, (-1, width // 4, 4)).transpose(3, 4).flatten(2)
        fields.append(plane)
    return torch.cat(fields, dim=2).flatten(1)


# ---- the product


def operands(packed: Tensor, format: str) -> tuple[Tensor | None, ...]:
    """words, highs, scales, minimums, zeros and steps, as the kernels take them: views."""
    form, fixed = FORMATS[format], constants(format)
    of_field = split_planes(packed, form)
    scale = next(field for field in form.fields if field.name in ("scale", "unit"))
    highs = of_field.get("high")
    if highs is not None:
        highs = highs.view(torch.int16 if form.bits == 5 and fixed["W"] == 16 else torch.int32)
    minimums = of_field.get("minimum", of_field.get("minimum_unit"))
    return (
        of_field["codes"].view(torch.int32),
        highs,
        of_field[scale.name].view(torch.float16 if scale.size == 2 else torch.float32),
        None if minimums is None else minimums.view(torch.float16),
        of_field.get("zero"),
        of_field.get("scales"),
    )


def unpack_rows(packed: Tensor, format: str, rows: range, dtype: torch.dtype) -> Tensor:
    """Those rows of the weight as numbers: (rows, columns) in `dtype`, to which they are rounded from float32."""
    form, fixed = FORMATS[format], constants(format)
    columns = packed.shape[1] // form.block_bytes * form.block
    y = packed.new_empty((len(rows), columns), dtype=dtype)
    N, C = 8, 128 // fixed["J"]
    num_chunks = columns // (fixed["W"] * fixed["PARTS"])
    grid = triton.cdiv(len(rows), N), triton.cdiv(num_chunks, C)
    unpack_kernel[grid](
        *operands(packed, format), levels_of(format, packed.device), ONE, y, rows.start, rows.stop, num_chunks,
        N=N, C=C, **fixed, num_warps=4,
    )  # fmt: skip
    return y


def unpacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """By the matrix library, x (rows, columns)."""
    outputs = len(packed)
    bias = None if bias is None else bias.to(x.dtype)
    size = max(1, MOST_UNPACKED // x.shape[1])
    pieces = [range(first, min(first + size, outputs)) for first in range(0, outputs, size)]
    if len(pieces) == 1:
        return F.linear(x, unpack_rows(packed, format, pieces[0], x.dtype), bias)
    y = x.new_empty((len(x), outputs))
    for rows in pieces:
        part = slice(rows.start, rows.stop)
        y[:, part] = F.linear(x, unpack_rows(packed, format, rows, x.dtype), None if bias is None else bias[part])
    return y


def turn(x: Tensor, format: str) -> Tensor:
    """x (rows, columns) in the order in which the bytes of words come: (rows, PARTS, 4, chunks, J)."""
    fixed = constants(format)
    parts, span, width = fixed["PARTS"], fixed["SPAN"], fixed["W"]
    chunks = x.view(len(x), -1, parts, span // width, 4, width // 4)  # in the midst, chunks of one span
    return chunks.permute(0, 2, 4, 1, 3, 5).contiguous()


def fused_linear(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """By our kernels, x (rows, columns)."""
    fixed, (rows, columns), outputs = constants(format), x.shape, len(packed)
    num_chunks = columns // (fixed["W"] * fixed["PARTS"])
    stored, levels = operands(packed, format), levels_of(format, x.device)
    if rows == 1:  # a warp for itself: each thread has the x of the words that it reads
        M, N, C, programs = 1, 4, 128 // fixed["J"], SMALL_PROGRAMS
    else:
        M, N, C, programs = max(16, triton.next_power_of_2(rows)), 64, 64 // fixed["J"], PROGRAMS
    grid = triton.cdiv(outputs, N), *([] if rows == 1 else [triton.cdiv(rows, M)])
    num_steps = triton.cdiv(num_chunks, C)
    splits = max(1, min(programs // grid[0], num_steps // 2))
    num_steps = triton.cdiv(num_steps, splits)
    splits = triton.cdiv(triton.cdiv(num_chunks, C), num_steps)
    y = x.new_empty((splits, rows, outputs), dtype=x.dtype if splits == 1 else torch.float32)
    if rows == 1:
        row_kernel[(*grid, splits)](
            x, *stored, bias, levels, ONE, y, outputs, num_chunks, num_steps, N=N, C=C, **fixed,
            STAGES=3 if fixed["BITS"] == 8 else 1, num_warps=1,
        )  # fmt: skip
    else:
        rows_kernel[(*grid, splits)](
            turn(x, format), *stored, bias, levels, ONE, y, rows, outputs, num_chunks, num_steps,
            M=M, N=N, C=C, **fixed, num_warps=4, num_stages=2 if levels is None else 1,
        )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def launch(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """`packed_linear`'s implementation."""
    form, (outputs, row_bytes), columns = FORMATS[format], packed.shape, x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"packed_linear takes bfloat16, float16 or float32, not {x.dtype}")
    if columns % form.block or row_bytes != columns // form.block * form.block_bytes:
        raise ValueError(f"{row_bytes} bytes of {format} are not {columns} columns")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} is not for {outputs} outputs")
    if not packed.is_contiguous() or packed.data_ptr() % 16:
        raise ValueError("a weight in planes is contiguous, and begins at a multiple of 16 bytes")
    rows = x.numel() // columns
    if rows == 0 or outputs == 0:
        return x.new_zeros((*x.shape[:-1], outputs))
    product = fused_linear if rows <= FEW else unpacked_linear
    return product(x.reshape(rows, columns).contiguous(), packed, bias, format).view(*x.shape[:-1], outputs)


LIBRARY = torch.library.Library("llama", "FRAGMENT")
LIBRARY.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, str format) -> Tensor")
LIBRARY.impl("packed_linear", launch, "CompositeExplicitAutograd")


@torch.library.register_fake("llama::packed_linear")
def _(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """x @ weight.T + bias.

    x: (..., columns) bfloat16, float16 or float32. packed: uint8 (outputs, bytes), what `to_words` makes. bias:
    float32 (outputs,). Returns (..., outputs) in x's dtype. Up to FEW rows the packed bytes are read once. A row's low
    bits depend on how many rows there are, but not on the other rows. Raises ValueError for other shapes and types.
    """
    return torch.ops.llama.packed_linear(x, packed, bias, format)
