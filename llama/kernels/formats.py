"""The low-bit formats: what their bytes mean, how numbers become them and back, and what kernels must know of them.

A packed weight is uint8 of shape (rows, blocks * block_bytes): each row is cut into blocks of `block` columns, and a
block is a few fields (scales, codes) side by side. Inside a block every `group` columns share one scale, and

    weight = value(code) * scale + minimum          value(code) = code - offset, or an entry of a table

where zero_int4's offset is a field too. A new format is a row in `FORMATS`, and a class where no other has its fields.

Sources: ggml's block structures for q4_0 to q6_k; BigDL-LLM 2.4 for sym_int4, asym_int4, sym_int5, asym_int5, sym_int8
and nf4, which are the same blocks with 64 columns, sym_int8's scale in float32, and nf4's first half in the high bits.
zero_int4 is ours: what GPTQ and AWQ store for a group of inputs, repeated for every 64 of them. `encode` does the
arithmetic of the published quantizers, in float32 and in their order, so that the bytes are equal too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama.kernels.bits import compact, halves, pack_bits, pack_nibbles, unpack_bits, unpack_nibbles

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip  # the quantiles of a normal distribution that QLoRA (Dettmers et al. 2023) made the NormalFloat of
NF4_MIDDLES = (
    -0.84809643, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018, 0.03979015,
    0.120255254, 0.20352125, 0.29201376, 0.38931254, 0.5016634, 0.6427869, 0.8614784,
)  # fmt: skip  # between neighbouring levels, as BigDL-LLM rounds them to float32: they decide ties

WEIGHTS_AT_ONCE = 1 << 20  # weights that are converted at a time: the temporaries stay small, and in the cache


class LowBitError(ValueError):
    """A weight, a format name or a split that the low-bit formats cannot serve."""


@dataclass(frozen=True)
class Field:
    """`size` bytes of every block; `unit` bytes at a time move together when rows are interleaved."""

    name: str
    size: int
    unit: int
    bit_planes: bool = False  # one bit a column: the kernel layout orders the bits for shift-and-mask


@dataclass(frozen=True)
class Groups:
    """Decoded blocks, n of them: integer codes (n, groups, group), scale and minimum float32 (n, groups, 1)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None


@dataclass(frozen=True)
class LowBitFormat:
    """One low-bit format. `fields` are in the order of the bytes on disk.

    A class of its own needs `encode` and `unpack`; with them everything works on PyTorch's operators. Which formats
    the compiled kernels serve, the compiled library says; which Triton's does, the class.
    """

    name: str
    block: int
    group: int
    bits: int
    offset: int
    fields: tuple[Field, ...]

    levels: ClassVar[tuple[float, ...] | None] = None
    """What each code stands for; None: code - offset."""
    triton: ClassVar[bool] = False
    """Whether the Triton kernel knows what the fields mean."""
    step_bits: ClassVar[int] = 0
    """The scale of a group is this many bits of the field `scales` times the block's `unit`; 0: it is `scale`."""
    high_half_first: ClassVar[bool] = False
    """Whether of the two codes in a byte the one of the earlier column is in the high bits."""

    @property
    def block_bytes(self) -> int:
        return sum(field.size for field in self.fields)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def rounded(self) -> int:
        """Columns whose activations the C++ kernels round together; in K-quants several groups."""
        return min(self.block, 64)

    @property
    def span(self) -> int:
        """How many columns apart the two codes of a byte are."""
        return self.block // 2

    def encode(self, x: Tensor) -> Tensor:
        """float32 (n, block), finite -> uint8 (n, block_bytes)"""
        raise NotImplementedError

    def unpack(self, blocks: Tensor) -> Groups:
        """Decode uint8 (n, block_bytes)."""
        raise NotImplementedError

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for before the scale is applied, float32 of the same shape."""
        if self.levels is None:
            return codes.float() - self.offset
        return torch.tensor(self.levels, device=codes.device)[codes.int()]

    def quantize(self, weight: Tensor) -> Tensor:
        """Pack (rows, columns) of any float dtype -> uint8 (rows, columns / block * block_bytes) on its device.

        Raises LowBitError for columns that are not whole blocks, and for numbers that are not finite or too large.
        """
        packed = weight.new_empty((weight.shape[0], self.packed_columns(weight.shape[1])), dtype=torch.uint8)
        for rows in row_chunks(*weight.shape):
            part = weight[rows].float()
            if not part.abs().amax() <= 65504:
                raise LowBitError(
                    f"{self.name} holds finite numbers up to 65504; the weight has others (NaN, infinity)"
                )
            packed[rows] = self.encode(part.reshape(-1, self.block)).view(part.shape[0], -1)
        return packed

    def dequantize(self, packed: Tensor) -> Tensor:
        """Unpack uint8 (rows, bytes) -> float32 (rows, columns)."""
        num_rows, columns = packed.shape[0], packed.shape[1] // self.block_bytes * self.block
        if num_rows * columns <= WEIGHTS_AT_ONCE:
            return self.numbers(packed).view(num_rows, columns)
        weight = packed.new_empty((num_rows, columns), dtype=torch.float32)
        for rows in row_chunks(num_rows, columns):
            weight[rows] = self.numbers(packed[rows]).view(-1, columns)
        return weight

    def numbers(self, packed: Tensor) -> Tensor:
        """All weights of some rows, one group after the other."""
        groups = self.unpack(packed.reshape(-1, self.block_bytes))
        part = self.values(groups.codes) * groups.scale
        return part if groups.minimum is None else part + groups.minimum

    def packed_columns(self, in_features: int) -> int:
        """Bytes of one packed row. Raises LowBitError where whole blocks do not fill the row."""
        if in_features % self.block:
            fitting = [name for name, form in FORMATS.items() if in_features % form.block == 0]
            raise LowBitError(
                f"{self.name} packs {self.block} columns at a time and {in_features} columns are not a multiple; "
                f"choose {', '.join(fitting) or 'no low-bit format'}"
            )
        return in_features // self.block * self.block_bytes

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

    def cut(self, blocks: Tensor) -> dict[str, Tensor]:
        """The fields of uint8 (n, block_bytes), each a contiguous (n, size)."""
        parts = blocks.split([field.size for field in self.fields], dim=-1)
        return {field.name: compact(part) for field, part in zip(self.fields, parts, strict=True)}

    def join(self, **parts: Tensor) -> Tensor:
        """The inverse of `cut`: uint8 (n, block_bytes). Parts of other types give their bytes."""
        return torch.cat([compact(parts[field.name]).view(torch.uint8) for field in self.fields], dim=-1)


def row_chunks(num_rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, about WEIGHTS_AT_ONCE weights each."""
    step = max(1, WEIGHTS_AT_ONCE // max(columns, 1))
    return (slice(start, start + step) for start in range(0, num_rows, step))


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in float32; 0 for 0, so that an all-zero block stays zero."""
    return torch.where(scale == 0, 0, 1 / scale)


def to_codes(values: Tensor, highest: int) -> Tensor:
    """Truncate to codes 0..highest, uint8. A scale so small that its reciprocal overflows gives code 0."""
    return values.nan_to_num(0, 0, 0).trunc().clamp(0, highest).to(torch.uint8)


def signed_peak(x: Tensor) -> Tensor:
    """(..., k) -> (..., 1): the value of largest magnitude, the first of equals, with its sign."""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))


def in_units(scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scales (n, k) as whole multiples, float32 (n, k), of one float16 (n, 1); the largest becomes `most`."""
    unit = (signed_peak(scales) / most).half()
    steps = (scales * reciprocal(unit.float())).round()
    return steps.clamp(min(most, 0), abs(most) - (most < 0)), unit


class Affine(LowBitFormat):
    """One scale a block, with a minimum (codes count upwards from it) or without (codes are centred)."""

    triton = True
    has_minimum: ClassVar[bool] = False

    @classmethod
    def of(cls, name: str, block: int, bits: int, scale_bytes: int = 2) -> Affine:
        fields = [Field("scale", scale_bytes, scale_bytes)]
        if cls.has_minimum:
            fields.append(Field("minimum", 2, 2))
        if bits == 5:
            fields.append(Field("high", block // 8, 4, bit_planes=True))
        fields.append(Field("codes", block if bits == 8 else block // 2, 4))
        return cls(name, block, block, bits, 0 if cls.has_minimum else 2 ** (bits - 1), tuple(fields))

    def pack(self, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
        """Codes uint8 (n, block), scale and minimum float32 (n, 1) -> uint8 (n, block_bytes)."""
        parts = {"scale": scale if self.fields[0].size == 4 else scale.half()}
        if minimum is not None:
            parts["minimum"] = minimum.half()
        if self.bits == 5:
            parts["high"] = pack_bits(codes >> 4)
        # eight bits are stored as two's complement
        parts["codes"] = codes ^ 128 if self.bits == 8 else pack_nibbles(codes)
        return self.join(**parts)

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        scale = parts["scale"].view(torch.float32) if self.fields[0].size == 4 else halves(parts["scale"])
        minimum = halves(parts["minimum"]).unsqueeze(-1) if self.has_minimum else None
        codes = parts["codes"] ^ 128 if self.bits == 8 else unpack_nibbles(parts["codes"])
        if self.bits == 5:
            codes |= unpack_bits(parts["high"]) << 4
        return Groups(codes.unsqueeze(1), scale.unsqueeze(-1), minimum)


class Symmetric(Affine):
    """The value of largest magnitude gets the lowest code, exactly."""

    def encode(self, x: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        scale = signed_peak(x) / -half
        return self.pack(to_codes(x * reciprocal(scale) + (half + 0.5), 2 * half - 1), scale)


class Asymmetric(Affine):
    """Codes count evenly from the block's minimum to its maximum."""

    has_minimum = True

    def encode(self, x: Tensor) -> Tensor:
        highest = 2**self.bits - 1
        minimum, maximum = x.aminmax(dim=-1, keepdim=True)
        scale = (maximum - minimum) / highest
        return self.pack(to_codes((x - minimum) * reciprocal(scale) + 0.5, highest), scale, minimum)


class Rounded(Affine):
    """Eight bits, rounded to the nearest of -127..127, halves away from zero."""

    def encode(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        scaled = (x * reciprocal(scale)).nan_to_num(0, 0, 0)
        magnitude = scaled.abs()
        whole = magnitude.floor()
        rounded = (whole + (2 * (magnitude - whole)).floor()).copysign(scaled)
        return self.pack((rounded + 128).to(torch.uint8), scale)


class ZeroPoint(LowBitFormat):
    """One scale a block, and the code that stands for zero: even steps over a range that includes zero."""

    triton = True

    @classmethod
    def of(cls, name: str, block: int) -> ZeroPoint:
        fields = Field("scale", 2, 2), Field("zero", 1, 1), Field("codes", block // 2, 4)
        return cls(name, block, block, 4, 0, fields)

    def encode(self, x: Tensor) -> Tensor:
        minimum, maximum = x.aminmax(dim=-1, keepdim=True)
        minimum = minimum.clamp(max=0)
        scale = ((maximum.clamp(min=0) - minimum) / 15).half().float()
        zero = to_codes(-minimum * reciprocal(scale) + 0.5, 15)
        return self.pack(to_codes(x * reciprocal(scale) + zero + 0.5, 15), scale, zero)

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes uint8 (n, block), scale of any float type and zero uint8 (n, 1) -> uint8 (n, block_bytes)."""
        return self.join(scale=scale.half(), zero=zero, codes=pack_nibbles(codes))

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        codes = unpack_nibbles(parts["codes"]).short() - parts["zero"].short()
        return Groups(codes.unsqueeze(1), halves(parts["scale"]).unsqueeze(-1))


class NormalFloat(LowBitFormat):
    """Sixteen unevenly spaced levels times the block's largest magnitude; the first half in the high bits."""

    triton = True
    levels = NF4_LEVELS
    high_half_first = True

    @classmethod
    def of(cls, name: str, block: int) -> NormalFloat:
        return cls(name, block, block, 4, 0, (Field("scale", 2, 2), Field("codes", block // 2, 4)))

    def encode(self, x: Tensor) -> Tensor:
        """The nearest level; code 0 throughout for an all-zero block."""
        scale = x.abs().amax(dim=-1, keepdim=True)
        scaled = torch.where(scale == 0, -1, x / scale)
        codes = torch.bucketize(scaled, torch.tensor(NF4_MIDDLES, device=x.device), out_int32=True)
        return self.pack(codes.to(torch.uint8), scale)

    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes uint8 (n, block), scale float32 (n, 1) -> uint8 (n, block_bytes)."""
        return self.join(scale=scale.half(), codes=pack_nibbles(codes.roll(self.block // 2, dims=-1)))

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        codes = unpack_nibbles(parts["codes"]).roll(self.block // 2, dims=-1)
        return Groups(codes.unsqueeze(1), halves(parts["scale"]).unsqueeze(-1))


class Q4K(LowBitFormat):
    """Eight groups of 32 columns; each has a six-bit scale and a six-bit minimum, in units of two halves."""

    triton = True
    step_bits = 6
    span = 32

    @classmethod
    def of(cls, name: str) -> Q4K:
        units = Field("unit", 2, 2), Field("minimum_unit", 2, 2)
        return cls(name, 256, 32, 4, 0, (*units, Field("scales", 12, 1), Field("codes", 128, 4)))

    def encode(self, x: Tensor) -> Tensor:
        """Even steps from each group's minimum (at most zero) to its maximum; not ggml's search for better ones."""
        x = x.unflatten(-1, (8, 32))
        minimum, maximum = x.aminmax(dim=-1)
        minimum = minimum.clamp(max=0)
        steps, unit = in_units((maximum - minimum) / 15, 63)
        minimum_steps, minimum_unit = in_units(-minimum, 63)
        scale, offset = (
            (steps * unit.float()).unsqueeze(-1),
            (minimum_steps * minimum_unit.float()).unsqueeze(-1),
        )
        codes = to_codes((x + offset) * reciprocal(scale) + 0.5, 15)
        return self.pack(codes, steps.to(torch.uint8), unit, minimum_steps.to(torch.uint8), minimum_unit)

    def pack(self, codes: Tensor, scale: Tensor, unit: Tensor, minimum: Tensor, minimum_unit: Tensor) -> Tensor:
        """Codes (n, 8, 32), scale and minimum uint8 (n, 8) below 64, their units float16 (n, 1)."""
        first, last = scale.chunk(2, dim=-1)
        minimum_first, minimum_last = minimum.chunk(2, dim=-1)
        scales = [
            first | last >> 4 << 6,
            minimum_first | minimum_last >> 4 << 6,
            last & 15 | minimum_last << 4,
        ]
        packed = pack_nibbles(codes.view(-1, 4, 64)).flatten(1)
        return self.join(unit=unit, minimum_unit=minimum_unit, scales=torch.cat(scales, dim=-1), codes=packed)

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        low, minimum_low, rest = parts["scales"].chunk(3, dim=-1)
        scale = halves(parts["unit"]) * torch.cat([low & 63, rest & 15 | low >> 6 << 4], dim=-1)
        minimum_steps = torch.cat([minimum_low & 63, rest >> 4 | minimum_low >> 6 << 4], dim=-1)
        minimum = halves(parts["minimum_unit"]) * minimum_steps
        codes = unpack_nibbles(parts["codes"].view(-1, 4, 32)).view(-1, 8, 32)
        return Groups(codes, scale.unsqueeze(-1), -minimum.unsqueeze(-1))


class Q6K(LowBitFormat):
    """Sixteen groups of 16 columns, each with an eight-bit scale in units of one half; codes of 4 + 2 bits."""

    triton = True
    step_bits = 8
    span = 64

    @classmethod
    def of(cls, name: str) -> Q6K:
        codes = Field("codes", 128, 4), Field("high", 64, 4)
        return cls(name, 256, 16, 6, 32, (*codes, Field("scales", 16, 1), Field("unit", 2, 2)))

    def encode(self, x: Tensor) -> Tensor:
        """The value of largest magnitude in each group gets the lowest code; not ggml's search for better scales."""
        x = x.unflatten(-1, (16, 16))
        steps, unit = in_units(signed_peak(x).squeeze(-1) / -32, -128)
        codes = to_codes(x * reciprocal((steps * unit.float()).unsqueeze(-1)) + 32.5, 63)
        return self.pack(codes, steps.to(torch.int8), unit)

    def pack(self, codes: Tensor, scale: Tensor, unit: Tensor) -> Tensor:
        """Codes (n, 16, 16) below 64, scale int8 (n, 16), its unit float16 (n, 1)."""
        parts = codes.view(-1, 2, 4, 32)  # of 128 columns each
        low = pack_nibbles(parts.flatten(2))
        high = parts >> 4
        high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        return self.join(codes=low.flatten(1), high=high.flatten(1), scales=scale, unit=unit)

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        low = unpack_nibbles(parts["codes"].view(-1, 2, 64)).view(-1, 2, 4, 32)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
        high = parts["high"].view(-1, 2, 1, 32) >> shifts & 3
        scale = halves(parts["unit"]) * parts["scales"].view(torch.int8)
        return Groups((low | high << 4).view(-1, 16, 16), scale.unsqueeze(-1))


FORMATS: dict[str, LowBitFormat] = {
    form.name: form
    for form in (
        Symmetric.of("sym_int4", 64, 4),
        Asymmetric.of("asym_int4", 64, 4),
        Symmetric.of("sym_int5", 64, 5),
        Asymmetric.of("asym_int5", 64, 5),
        Rounded.of("sym_int8", 64, 8, scale_bytes=4),
        ZeroPoint.of("zero_int4", 64),
        NormalFloat.of("nf4", 64),
        Symmetric.of("q4_0", 32, 4),
        Asymmetric.of("q4_1", 32, 4),
        Symmetric.of("q5_0", 32, 5),
        Asymmetric.of("q5_1", 32, 5),
        Rounded.of("q8_0", 32, 8),
        Q4K.of("q4_k"),
        Q6K.of("q6_k"),
    )
}
