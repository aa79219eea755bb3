"""Low-bit weights: the formats as one table, and the linear that holds its weight in one of them.

`FORMATS[name].quantize` gives the published bytes (`llama/kernels/layouts.py` has the layouts and their sources); the
arithmetic is that of the published quantizers, in float32 and in their order, so that the bytes are equal too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama import kernels
from llama.kernels.layouts import LAYOUTS, Layout

NF4_MIDDLES = (
    *(-0.84809643, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018, 0.03979015),
    *(0.120255254, 0.20352125, 0.29201376, 0.38931254, 0.5016634, 0.6427869, 0.8614784),
)  # between neighbouring levels, as BigDL-LLM rounds them to float32: they decide ties

CHUNK = 1 << 20  # weights that are converted at a time: the temporaries stay small, and in the cache


class LowBitError(ValueError):
    """A weight, a format name or a split that the low-bit formats cannot serve."""


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in float32; 0 for 0, so that an all-zero block stays zero."""
    return torch.where(scale == 0, 0, 1 / scale)


def to_codes(values: Tensor, highest: int) -> Tensor:
    """Truncate to codes 0..highest, uint8. A scale so small that its reciprocal overflows gives code 0."""
    return values.nan_to_num(0, 0, 0).trunc().clamp(0, highest).to(torch.uint8)


def signed_peak(x: Tensor) -> Tensor:
    """(..., k) -> (..., 1): the value of largest magnitude, the first of equals, with its sign."""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))


def encode_symmetric(layout: Layout, x: Tensor) -> Tensor:
    """The value of largest magnitude gets the lowest code, exactly."""
    half = 2 ** (layout.bits - 1)
    scale = signed_peak(x) / -half
    return layout.pack(to_codes(x * reciprocal(scale) + (half + 0.5), 2 * half - 1), scale)


def encode_with_minimum(layout: Layout, x: Tensor) -> Tensor:
    """Codes count evenly from the block's minimum to its maximum."""
    highest = 2**layout.bits - 1
    minimum, maximum = x.aminmax(dim=-1, keepdim=True)
    scale = (maximum - minimum) / highest
    return layout.pack(to_codes((x - minimum) * reciprocal(scale) + 0.5, highest), scale, minimum)


def encode_int8(layout: Layout, x: Tensor) -> Tensor:
    """Rounded to the nearest of -127..127, halves away from zero."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    scaled = (x * reciprocal(scale)).nan_to_num(0, 0, 0)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = (whole + (2 * (magnitude - whole)).floor()).copysign(scaled)
    return layout.pack((rounded + 128).to(torch.uint8), scale)


def encode_nf4(layout: Layout, x: Tensor) -> Tensor:
    """The nearest level; code 0 throughout for an all-zero block."""
    scale = x.abs().amax(dim=-1, keepdim=True)
    scaled = torch.where(scale == 0, -1, x / scale)
    codes = torch.bucketize(scaled, torch.tensor(NF4_MIDDLES, device=x.device), out_int32=True)
    return layout.pack(codes.to(torch.uint8), scale)


def encode_q4_k(layout: Layout, x: Tensor) -> Tensor:
    """Even steps from each group's minimum (at most zero) to its maximum; not ggml's search for better ones."""
    x = x.unflatten(-1, (8, 32))
    minimum, maximum = x.aminmax(dim=-1)
    minimum = minimum.clamp(max=0)
    steps, units = zip(*(in_units((maximum - minimum) / 15, 63), in_units(-minimum, 63)), strict=True)
    scale, offset = ((step * unit.float()).unsqueeze(-1) for step, unit in zip(steps, units, strict=True))
    codes = to_codes((x + offset) * reciprocal(scale) + 0.5, 15)
    return layout.pack(codes, steps[0].to(torch.uint8), units[0], steps[1].to(torch.uint8), units[1])


def encode_q6_k(layout: Layout, x: Tensor) -> Tensor:
    """The value of largest magnitude in each group gets the lowest code; not ggml's search for better scales."""
    x = x.unflatten(-1, (16, 16))
    steps, unit = in_units(signed_peak(x).squeeze(-1) / -32, -128)
    codes = to_codes(x * reciprocal((steps * unit.float()).unsqueeze(-1)) + 32.5, 63)
    return layout.pack(codes, steps.to(torch.int8), unit)


def in_units(scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scales (n, k) as whole multiples, float32 (n, k), of one float16 (n, 1); the largest becomes `most`."""
    unit = signed_peak(scales) / most
    steps = (scales * reciprocal(unit)).nan_to_num(0, 0, 0).round()
    return steps.clamp(min(most, 0), abs(most) - (most < 0)), unit.half()


@dataclass(frozen=True)
class Format:
    """A low-bit format: its byte layout, and how numbers become those bytes."""

    layout: Layout
    encode: Callable[[Layout, Tensor], Tensor]  # float32 (n, block) -> uint8 (n, block_bytes)

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def block(self) -> int:
        """Columns of one row that are packed together."""
        return self.layout.block

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def packed_columns(self, in_features: int) -> int:
        """Bytes of one packed row. Raises LowBitError where whole blocks do not fill the row."""
        if in_features % self.block:
            raise LowBitError(
                f"{self.name} packs {self.block} columns at a time and {in_features} columns are not a multiple; "
                f"choose {allowed_formats(in_features)}"
            )
        return in_features // self.block * self.block_bytes

    def quantize(self, weight: Tensor) -> Tensor:
        """Pack (rows, columns) of any float dtype -> uint8 (rows, columns / block * block_bytes) on its device.

        Raises LowBitError for columns that are not whole blocks, and for numbers that are not finite or too large.
        """
        packed = weight.new_empty((weight.shape[0], self.packed_columns(weight.shape[1])), dtype=torch.uint8)
        for rows in row_chunks(*weight.shape):
            part = weight[rows].float()
            if not part.abs().amax() <= 65504:
                raise LowBitError(f"{self.name} holds finite numbers up to 65504; the weight has others (NaN, infinity)")
            packed[rows] = self.encode(self.layout, part.reshape(-1, self.block)).view(part.shape[0], -1)
        return packed

    def dequantize(self, packed: Tensor) -> Tensor:
        """Unpack uint8 (rows, bytes) -> float32 (rows, columns)."""
        num_rows, columns = packed.shape[0], packed.shape[1] // self.block_bytes * self.block
        weight = packed.new_empty((num_rows, columns), dtype=torch.float32)
        for rows in row_chunks(num_rows, columns):
            weight[rows] = self.layout.dequantize(packed[rows])
        return weight

    def split(self, packed: Tensor, dim: int, rank: int, world_size: int) -> Tensor:
        """This rank's rows (dim 0) or columns (dim 1) of packed uint8 (rows, bytes), a view.

        Raises LowBitError, naming the sizes that work, where rows or blocks do not divide by `world_size`.
        """
        count = packed.shape[0] if dim == 0 else packed.shape[1] // self.block_bytes
        if count % world_size:
            what = "rows" if dim == 0 else f"blocks of {self.block} columns"
            sizes = ", ".join(str(size) for size in range(1, 65) if count % size == 0)
            raise LowBitError(f"{self.name}: {count} {what} do not divide among {world_size} ranks; use one of {sizes}")
        share = packed.shape[dim] // world_size
        return packed.narrow(dim, rank * share, share)


FORMATS: dict[str, Format] = {
    name: Format(LAYOUTS[name], encode)
    for name, encode in (
        ("sym_int4", encode_symmetric),
        ("asym_int4", encode_with_minimum),
        ("sym_int5", encode_symmetric),
        ("asym_int5", encode_with_minimum),
        ("sym_int8", encode_int8),
        ("nf4", encode_nf4),
        ("q4_0", encode_symmetric),
        ("q4_1", encode_with_minimum),
        ("q5_0", encode_symmetric),
        ("q5_1", encode_with_minimum),
        ("q8_0", encode_int8),
        ("q4_k", encode_q4_k),
        ("q6_k", encode_q6_k),
    )
}


def allowed_formats(in_features: int) -> str:
    """The formats whose blocks fill `in_features` columns, for an error's advice."""
    return ", ".join(name for name, form in FORMATS.items() if in_features % form.block == 0) or "no low-bit format"


def row_chunks(num_rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, about CHUNK weights each."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, num_rows, step))
