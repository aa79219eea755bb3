"""Products with a packed weight on a GPU, in Triton: `packed_linear`, which reads the published layout as it is.

One kernel serves every format whose class says so, q4_k and q6_k included. A row's code bytes are cut into chunks that
share a scale, W bytes each; a byte holds one code (PARTS = 1) or two whose columns are SPAN apart (PARTS = 2), so the
halves of a byte are multiplied with two pieces of x and never woven together. Codes become numbers in registers:

    one row     each thread keeps its own sums in float32 and they are added up once, at the end
    more rows   a tile of weights is rounded to x's dtype for the matrix units, which sum in float32

Where the outputs alone give too few programs, the columns are split too, and the parts added in a fixed order. Tiles
are fixed rather than measured when first run: the same product has the same bits in every process.

Importing this file imports Triton. `TRITON_INTERPRET=1`, set before that, runs it on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.formats import FORMATS

PROGRAMS = 512  # to fill a large card: four for each of 132 multiprocessors


@triton.jit
def load_integer(pointer, mask, BYTES: tl.constexpr, UNIT: tl.constexpr):
    """Little-endian integers of BYTES bytes at addresses that are multiples of UNIT (1 or 2) only, as int32."""
    value = tl.zeros(pointer.shape, tl.int32)
    for i in tl.static_range(0, BYTES, UNIT):
        part = (pointer + i).to(tl.pointer_type(tl.uint16 if UNIT == 2 else tl.uint8))
        value |= tl.load(part, mask=mask, other=0).to(tl.int32) << (8 * i)
    return value


@triton.jit
def load_float(pointer, mask, BYTES: tl.constexpr, UNIT: tl.constexpr):
    """float16 or float32 numbers, by their BYTES, as float32."""
    bits = load_integer(pointer, mask, BYTES, UNIT)
    if BYTES == 4:
        return bits.to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def linear_kernel(
    x,  # (rows, columns)
    packed,  # uint8 (outputs, bytes)
    bias,  # float32 (outputs,) or None
    levels,  # float32 (16,), or None where codes are evenly spaced
    y,  # (splits, rows, outputs)
    rows,
    outputs,
    blocks,  # of one row
    steps,  # of C chunks each, for one split
    M: tl.constexpr,  # the tile: rows of x,
    N: tl.constexpr,  # rows of the weight,
    C: tl.constexpr,  # chunks of both
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    FLIP: tl.constexpr,  # 1 where the first of a byte's two codes is in its high bits
    W: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNKS: tl.constexpr,  # of one block
    UNIT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES: tl.constexpr,  # where fields begin in a block, -1 where there is none
    HIGH: tl.constexpr,
    SCALE: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    STEPS: tl.constexpr,
    STEP_BITS: tl.constexpr,  # of a group's scale where a block's scale is their unit, else 0
    SCALE_BYTES: tl.constexpr,
):
    split = tl.program_id(2)
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(1) * M + tl.arange(0, M)
    # Rows beyond the last are computed as copies of it and not stored. The strides are multiples of constants, from
    # which the compiler learns how many bytes it can load at once.
    weight_rows = packed + tl.minimum(n, outputs - 1).to(tl.int64) * (blocks * BLOCK_BYTES)
    x_rows = x + tl.minimum(m, rows - 1).to(tl.int64) * (blocks * CHUNKS * W * PARTS)
    w = tl.arange(0, W)[None, None, :]
    if M == 1:
        byte = tl.arange(0, C)[:, None] * W + tl.arange(0, W)[None, :]  # of a tile's codes in one weight row
        total = tl.zeros((N, C, W), tl.float32)
    else:
        byte = tl.arange(0, C * W)
        total = tl.zeros((M, N), tl.float32)
    column = byte // SPAN * (SPAN * PARTS) + byte % SPAN  # of x, for the byte's first code

    # float32's product in three steps on the matrix units is as exact as that of ordinary units, and much faster
    precision: tl.constexpr = "tf32x3" if x.dtype.element_ty == tl.float32 else "ieee"

    for step in range(steps):
        first = (split * steps + step) * C
        chunk = first + tl.arange(0, C)[None, :]
        there = chunk < blocks * CHUNKS
        at = chunk % CHUNKS  # the chunk's place in its block
        block = weight_rows[:, None] + chunk // CHUNKS * BLOCK_BYTES  # (N, C)
        start = (block + CODES + at * W)[:, :, None] + w
        raw = tl.load(start, mask=there[:, :, None], other=0).to(tl.int32)  # (N, C, W)
        if BITS == 6:
            start = (block + HIGH + at // 4 * 32 + at % 2 * 16)[:, :, None] + w
            pairs = tl.load(start, mask=there[:, :, None], other=0).to(tl.int32) >> (at % 4 // 2 * 2)[:, :, None]

        for part in tl.static_range(PARTS):
            scale = load_float(block + SCALE, there, SCALE_BYTES, UNIT)  # (N, C)
            minimum = tl.zeros_like(scale)
            if MINIMUM >= 0:
                minimum = load_float(block + MINIMUM, there, 2, UNIT)
            if ZERO >= 0:
                minimum = -scale * load_integer(block + ZERO, there, 1, 1).to(tl.float32)
            if STEP_BITS == 8:
                group = block + STEPS + at // 4 * 8 + at % 4 + 4 * part
                scale *= load_integer(group, there, 1, 1).to(tl.int8).to(tl.float32)
            if STEP_BITS == 6:  # together for the first four groups, in two places for the others
                group = at * 2 + part
                low = block + STEPS + group % 4
                a = load_integer(low, there, 1, 1)
                b = load_integer(low + 4, there, 1, 1)
                rest = load_integer(low + 8, there, 1, 1)
                scale *= tl.where(group < 4, a & 63, rest & 15 | a >> 6 << 4).to(tl.float32)
                minimum *= -tl.where(group < 4, b & 63, rest >> 4 | b >> 6 << 4).to(tl.float32)

            if levels is not None:
                weight = tl.load(levels + (raw >> 4 * (part ^ FLIP) & 15)) * scale[:, :, None]
            else:
                # The code is put below the point of 1.0, which makes 1 + code / 2 ** BITS of it: exact, and cheaper
                # than a conversion. The 1 and the offset are taken off together with adding the minimum.
                if BITS == 8:
                    fraction = (raw ^ 128) << 15
                else:
                    fraction = (raw & 15 << 4 * (part ^ FLIP)) << 23 - BITS - 4 * (part ^ FLIP)
                if BITS == 5:
                    plane = load_integer(block + HIGH + part * W // 8, there, W // 8, UNIT)
                    fraction |= (plane[:, :, None] >> w & 1) << 22
                if BITS == 6:
                    fraction |= (pairs >> 4 * part & 3) << 21
                number = (fraction | 0x3F800000).to(tl.float32, bitcast=True)
                minimum -= (2**BITS + OFFSET) * scale
                weight = number * (2**BITS * scale)[:, :, None] + minimum[:, :, None]

            of_x = first * W * PARTS + part * SPAN + column
            there_x = of_x < blocks * CHUNKS * W * PARTS
            if M == 1:
                piece = tl.load(x + of_x, mask=there_x, other=0).to(tl.float32)
                total += weight * piece[None, :, :]
            else:
                piece = tl.load(x_rows[:, None] + of_x[None, :], mask=there_x[None, :], other=0)
                tile = tl.reshape(weight.to(x.dtype.element_ty), (N, C * W))
                total = tl.dot(piece, tl.trans(tile), total, input_precision=precision)

    if M == 1:
        total = tl.sum(tl.reshape(total, (N, C * W)), axis=1)[None, :]
    if bias is not None:
        total += tl.where(split == 0, tl.load(bias + n, mask=n < outputs, other=0), 0.0)[None, :]
    place = (split * rows + m[:, None]).to(tl.int64) * outputs + n[None, :]
    tl.store(y + place, total, mask=(m[:, None] < rows) & (n[None, :] < outputs))


@cache
def constants(format: str) -> dict[str, int]:
    """What the kernel is compiled for: a format's numbers, and where its fields begin in a block."""
    form = FORMATS[format]
    ends = accumulate(field.size for field in form.fields)
    starts = {field.name: end - field.size for field, end in zip(form.fields, ends, strict=True)}
    parts = 1 if form.bits == 8 else 2
    width = min(form.block // parts, form.group)
    scale = next(field for field in form.fields if field.name in ("scale", "unit"))
    return dict(
        BITS=form.bits,
        OFFSET=form.offset,
        PARTS=parts,
        FLIP=int(form.high_half_first),
        W=width,
        SPAN=width if parts == 1 else form.span,
        CHUNKS=form.block // parts // width,
        UNIT=2 if all(field.size % 2 == 0 for field in form.fields) else 1,
        BLOCK_BYTES=form.block_bytes,
        CODES=starts["codes"],
        HIGH=starts.get("high", -1),
        SCALE=starts[scale.name],
        SCALE_BYTES=scale.size,
        MINIMUM=starts.get("minimum", starts.get("minimum_unit", -1)),
        ZERO=starts.get("zero", -1),
        STEPS=starts.get("scales", -1),
        STEP_BITS=form.step_bits,
    )


@cache
def levels_of(format: str, device: torch.device) -> Tensor | None:
    """A format's table on `device`, float32; None where its codes are evenly spaced."""
    levels = FORMATS[format].levels
    return None if levels is None else torch.tensor(levels, device=device)


def launch(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """`packed_linear`'s implementation: chooses the tile, and how many parts the columns are split into."""
    form, fixed, levels = FORMATS[format], constants(format), levels_of(format, x.device)
    (outputs, row_bytes), columns = packed.shape, x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"packed_linear takes bfloat16, float16 or float32, not {x.dtype}")
    if columns % form.block or row_bytes != columns // form.block * form.block_bytes:
        raise ValueError(f"{row_bytes} bytes of {format} are not {columns} columns")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} is not for {outputs} outputs")
    rows = x.numel() // columns
    if rows == 0 or outputs == 0:
        return x.new_zeros((*x.shape[:-1], outputs))
    packed = packed.contiguous()
    if packed.data_ptr() % 2:  # fields are loaded two bytes at a time; only a view could be askew
        packed = packed.clone()

    chunks = row_bytes // form.block_bytes * fixed["CHUNKS"]
    if rows == 1:  # fewer scales (N * C) than threads: then Triton has each thread load those that it needs
        M, N, C, warps = 1, 8, 16, 8
    else:
        M = min(64 if x.dtype == torch.float32 else 128, max(16, triton.next_power_of_2(rows)))
        N, C, warps = max(32, M), 64 // fixed["W"], 8 if M == 128 else 4
    stages = 2 if levels is None else 1  # with more, the tiles that were loaded ahead do not fit small cards
    grid = triton.cdiv(outputs, N), triton.cdiv(rows, M)
    steps = triton.cdiv(chunks, C)
    splits = max(1, min(PROGRAMS // (grid[0] * grid[1]), steps // 4))
    steps = triton.cdiv(steps, splits)
    y = x.new_empty((splits, rows, outputs), dtype=x.dtype if splits == 1 else torch.float32)
    linear_kernel[(*grid, splits)](
        x.contiguous(), packed, bias, levels, y, rows, outputs, row_bytes // form.block_bytes, steps,
        M=M, N=N, C=C, **fixed, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return (y[0] if splits == 1 else y.sum(0).to(x.dtype)).view(*x.shape[:-1], outputs)


LIBRARY = torch.library.Library("llama", "FRAGMENT")
LIBRARY.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, str format) -> Tensor")
LIBRARY.impl("packed_linear", launch, "CompositeExplicitAutograd")


@torch.library.register_fake("llama::packed_linear")
def _(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """x @ weight.T + bias.

    x: (..., columns) bfloat16, float16 or float32. packed: uint8 (outputs, bytes), the published layout. bias: float32
    (outputs,). Returns (..., outputs) in x's dtype. Up to 16 rows the packed bytes are read once. A row's low bits
    depend on how many rows there are, but not on the other rows.
    """
    return torch.ops.llama.packed_linear(x, packed, bias, format)
