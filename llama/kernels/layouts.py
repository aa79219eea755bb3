"""The published byte layouts of low-bit weights, and the one layout that the C++ kernels read.

A packed weight is uint8 of shape (rows, blocks * block_bytes): each row is cut into blocks of `block` columns, and a
block is a few fields (scales, codes) side by side. Inside a block every `group` columns share one scale, and

    weight = value(code) * scale + minimum          value(code) = code - offset, or an entry of a table

where zero_int4's offset is a field too.

Sources: ggml's block structures for q4_0 to q6_k; BigDL-LLM 2.4 for sym_int4, asym_int4, sym_int5, asym_int5, sym_int8
and nf4, which are the same blocks with 64 columns, sym_int8's scale in float32, and nf4's first half in the high bits.
zero_int4 is ours: what GPTQ and AWQ store for a group of inputs, repeated for every 64 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16  # rows that lie side by side in the kernel layout: the 32-bit lanes of a 512-bit register

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # the quantiles of a normal distribution that QLoRA (Dettmers et al. 2023) made the NormalFloat of


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
class Layout:
    """One format's block. `fields` are in the order of the bytes on disk."""

    name: str
    block: int
    group: int
    bits: int
    offset: int
    fields: tuple[Field, ...]

    @property
    def block_bytes(self) -> int:
        return sum(field.size for field in self.fields)

    @property
    def rounded(self) -> int:
        """Columns whose activations the C++ kernels round together; in K-quants several groups."""
        return min(self.block, 64)

    def cut(self, blocks: Tensor) -> dict[str, Tensor]:
        """The fields of uint8 (n, block_bytes), each a contiguous (n, size)."""
        parts = blocks.split([field.size for field in self.fields], dim=-1)
        return {field.name: compact(part) for field, part in zip(self.fields, parts, strict=True)}

    def join(self, **parts: Tensor) -> Tensor:
        """The inverse of `cut`: uint8 (n, block_bytes). Parts of other types give their bytes."""
        return torch.cat([compact(parts[field.name]).view(torch.uint8) for field in self.fields], dim=-1)

    def unpack(self, blocks: Tensor) -> Groups:
        """Decode uint8 (n, block_bytes)."""
        raise NotImplementedError

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for before the scale is applied, float32 of the same shape."""
        return codes.float() - self.offset

    def dequantize(self, packed: Tensor) -> Tensor:
        """uint8 (rows, bytes) -> float32 (rows, columns)."""
        groups = self.unpack(packed.reshape(-1, self.block_bytes))
        weight = self.values(groups.codes) * groups.scale
        if groups.minimum is not None:
            weight += groups.minimum
        return weight.view(packed.shape[0], -1)


def compact(part: Tensor) -> Tensor:
    """A contiguous copy, always: what counts as contiguous already, a lone block's field, may begin at an odd byte or
    have odd strides in dimensions of one, and can then not be viewed as another type."""
    return part.clone(memory_format=torch.contiguous_format)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes (n, 2k), of which the low four bits count -> (n, k): code j in the low half, j + k in the high."""
    low, high = codes.chunk(2, dim=-1)
    return (low & 15) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(n, k) -> (n, 2k), the inverse of `pack_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def pack_bits(bits: Tensor) -> Tensor:
    """Zeros and ones uint8 (..., 8k) -> (..., k), the first of eight in the lowest bit."""
    bits = bits.unflatten(-1, (-1, 8))
    packed = bits[..., 0].clone()
    for i in range(1, 8):
        packed |= bits[..., i] << i
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """(..., k) -> (..., 8k), the inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)


class Affine(Layout):
    """One scale a block, with a minimum (codes count upwards from it) or without (codes are centred)."""

    @classmethod
    def of(cls, name: str, block: int, bits: int, minimum: bool = False, scale_bytes: int = 2) -> Affine:
        fields = [Field("scale", scale_bytes, scale_bytes)]
        if minimum:
            fields.append(Field("minimum", 2, 2))
        if bits == 5:
            fields.append(Field("high", block // 8, 4, bit_planes=True))
        fields.append(Field("codes", block if bits == 8 else block // 2, 4))
        return cls(name, block, block, bits, 0 if minimum else 2 ** (bits - 1), tuple(fields))

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
        scale = parts["scale"].view(torch.float32 if self.fields[0].size == 4 else torch.float16).float()
        minimum = parts["minimum"].view(torch.float16).float().unsqueeze(-1) if "minimum" in parts else None
        codes = parts["codes"] ^ 128 if self.bits == 8 else unpack_nibbles(parts["codes"])
        if self.bits == 5:
            codes |= unpack_bits(parts["high"]) << 4
        return Groups(codes.unsqueeze(1), scale.unsqueeze(-1), minimum)


class ZeroPoint(Layout):
    """One scale a block, and the code that stands for zero."""

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes uint8 (n, block), scale of any float type and zero uint8 (n, 1) -> uint8 (n, block_bytes)."""
        return self.join(scale=scale.half(), zero=zero, codes=pack_nibbles(codes))

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        codes = unpack_nibbles(parts["codes"]).short() - parts["zero"].short()
        return Groups(codes.unsqueeze(1), parts["scale"].view(torch.float16).float().unsqueeze(-1))


class NormalFloat(Layout):
    """Sixteen unevenly spaced levels times the block's largest magnitude; the first half in the high bits."""

    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes uint8 (n, block), scale float32 (n, 1) -> uint8 (n, block_bytes)."""
        return self.join(scale=scale.half(), codes=pack_nibbles(codes.roll(self.block // 2, dims=-1)))

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        codes = unpack_nibbles(parts["codes"]).roll(self.block // 2, dims=-1)
        return Groups(codes.unsqueeze(1), parts["scale"].view(torch.float16).float().unsqueeze(-1))

    def values(self, codes: Tensor) -> Tensor:
        return torch.tensor(NF4_LEVELS, device=codes.device)[codes.int()]


class Q4K(Layout):
    """Eight groups of 32 columns; each has a six-bit scale and a six-bit minimum, in units of two halves."""

    def pack(
        self, codes: Tensor, scale: Tensor, unit: Tensor, minimum: Tensor, minimum_unit: Tensor
    ) -> Tensor:
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
        scale = torch.cat([low & 63, rest & 15 | low >> 6 << 4], dim=-1).float()
        minimum = torch.cat([minimum_low & 63, rest >> 4 | minimum_low >> 6 << 4], dim=-1).float()
        scale = parts["unit"].view(torch.float16).float() * scale
        minimum = parts["minimum_unit"].view(torch.float16).float() * minimum
        codes = unpack_nibbles(parts["codes"].view(-1, 4, 32)).view(-1, 8, 32)
        return Groups(codes, scale.unsqueeze(-1), -minimum.unsqueeze(-1))


class Q6K(Layout):
    """Sixteen groups of 16 columns, each with an eight-bit scale in units of one half; codes of 4 + 2 bits."""

    def pack(self, codes: Tensor, scale: Tensor, unit: Tensor) -> Tensor:
        """Codes (n, 16, 16) below 64, scale int8 (n, 16), its unit float16 (n, 1)."""
        halves = codes.view(-1, 2, 4, 32)  # of 128 columns each
        low = pack_nibbles(halves.flatten(2))
        high = halves >> 4
        high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        return self.join(codes=low.flatten(1), high=high.flatten(1), scales=scale, unit=unit)

    def unpack(self, blocks: Tensor) -> Groups:
        parts = self.cut(blocks)
        low = unpack_nibbles(parts["codes"].view(-1, 2, 64)).view(-1, 2, 4, 32)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
        high = parts["high"].view(-1, 2, 1, 32) >> shifts & 3
        scale = parts["unit"].view(torch.float16).float() * parts["scales"].view(torch.int8).float()
        return Groups((low | high << 4).view(-1, 16, 16), scale.unsqueeze(-1))


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Affine.of("sym_int4", 64, 4),
        Affine.of("asym_int4", 64, 4, minimum=True),
        Affine.of("sym_int5", 64, 5),
        Affine.of("asym_int5", 64, 5, minimum=True),
        Affine.of("sym_int8", 64, 8, scale_bytes=4),
        ZeroPoint(
            *("zero_int4", 64, 64, 4, 0),
            (Field("scale", 2, 2), Field("zero", 1, 1), Field("codes", 32, 4)),
        ),
        NormalFloat("nf4", 64, 64, 4, 0, (Field("scale", 2, 2), Field("codes", 32, 4))),
        Affine.of("q4_0", 32, 4),
        Affine.of("q4_1", 32, 4, minimum=True),
        Affine.of("q5_0", 32, 5),
        Affine.of("q5_1", 32, 5, minimum=True),
        Affine.of("q8_0", 32, 8),
        Q4K(
            *("q4_k", 256, 32, 4, 0),
            (
                Field("unit", 2, 2),
                Field("minimum_unit", 2, 2),
                Field("scales", 12, 1),
                Field("codes", 128, 4),
            ),
        ),
        Q6K(
            *("q6_k", 256, 16, 6, 32),
            (Field("codes", 128, 4), Field("high", 64, 4), Field("scales", 16, 1), Field("unit", 2, 2)),
        ),
    )
}
