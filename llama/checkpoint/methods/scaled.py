"""Matrices of small integers or floats that scales multiply: fp8, compressed-tensors, LLM.int8.

    w = (number - zero) * scale

A scale belongs to a rectangle of the matrix: to all of it, a row, a part of a row, or a tile of some rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...files.errors import CheckpointError, shown
from ...kernels.formats import FORMATS, LowBitFormat
from ..arrays import Array, Mapped
from ..settings import Settings
from .method import Method, Parts, QuantizedMatrix, Where, are_halves, check, packable, require, unpack

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ACTIVATIONS = (  # what is stored beside a matrix and does not change it
    "input_scale", "input_scale_ub", "input_zero_point", "output_scale", "output_zero_point", "activation_scale",
)  # fmt: skip


@dataclass(frozen=True)
class PackedIntegers(Array):
    """Signed integers of `bits` bits, int8 (rows, columns), stored counting from the lowest, in int32 along `dim`."""

    words: Mapped
    bits: int
    size: tuple[int, int]
    dim: int = 1
    dtype = torch.int8

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    @property
    def stored(self) -> str:
        return f"int{self.bits}"

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        if self.dim == 1 and dim == 0:
            integers = unpack(self.words.read(0, start, stop), self.bits)
            return self._signed(integers[:, : self.shape[1]])
        words = self.words.read(0, 0, self.words.shape[0])
        integers = unpack(words, self.bits) if self.dim == 1 else unpack(words.T, self.bits).T
        return self._signed(integers[: self.shape[0], : self.shape[1]].narrow(dim, start, stop - start))

    def _signed(self, integers: Tensor) -> Tensor:
        return (integers - (1 << self.bits - 1)).view(torch.int8)


@dataclass(frozen=True)
class ScaledMatrix(QuantizedMatrix):
    """Numbers (out, in), and for every rectangle of them a scale and perhaps a zero."""

    numbers: Array
    scales: Mapped  # (vertically, horizontally), as many as there are rectangles
    zeros: Array | None
    rectangle: tuple[int, int]  # rows, columns
    groups: Mapped | None = None  # (in,): which scale of a row each column has, where they are not in order
    factor: float = 1.0  # what scales are multiplied by

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def stored(self) -> str:
        return "fp8" if self.numbers.dtype in FP8 else self.numbers.stored

    @property
    def nbytes(self) -> int:
        parts = (self.numbers, self.scales, self.zeros, self.groups)
        return sum(part.nbytes for part in parts if part is not None)

    def values(self, rows: slice) -> Tensor:
        numbers = self.numbers.read(0, rows.start, rows.stop).float()
        if self.zeros is not None:
            numbers -= self._spread(self.zeros, rows)
        return numbers * self._spread(self.scales, rows) * self.factor

    def fitting(self) -> LowBitFormat | None:
        """The format of ours that holds the same integers and scales; None where there is none."""
        if self.numbers.dtype != torch.int8 or self.groups is not None:
            return None
        is_byte = not isinstance(self.numbers, PackedIntegers) or self.numbers.bits == 8
        if not is_byte and (self.numbers.bits != 4 or self.factor != 1 or not are_halves(self.scales)):
            return None
        if is_byte and self.zeros is not None:
            return None
        form = FORMATS["sym_int8" if is_byte else "sym_int4" if self.zeros is None else "zero_int4"]
        return None if self.shape[1] % form.block or self.rectangle[1] % form.block else form

    def fields(self, rows: slice, columns: slice, form: LowBitFormat) -> tuple[Tensor, ...]:
        half = 1 << form.bits - 1
        parts = [self.numbers.read(0, rows.start, rows.stop)[:, columns].view(torch.uint8) + half]
        scales = self._spread(self.scales, rows)[:, columns][:, :: form.block, None]
        parts = [parts[0].unflatten(1, (-1, form.block)), scales * self.factor]
        if self.zeros is not None:
            zeros = self._spread(self.zeros, rows)[:, columns][:, :: form.block, None]
            parts.append((zeros + half).byte())
        return tuple(parts)

    def _spread(self, small: Array, rows: slice) -> Tensor:
        """One number a rectangle -> one for each column of these rows: float32 (rows, in)"""
        high, wide = self.rectangle
        first, last = rows.start // high, -(-rows.stop // high)
        numbers = small.read(0, first, last).float()
        if self.groups is not None:
            numbers = numbers[:, self.groups.read(0, 0, self.shape[1]).long()]
        else:
            numbers = numbers.repeat_interleave(wide, 1)[:, : self.shape[1]]
        skipped, count = rows.start - first * high, rows.stop - rows.start
        if len(numbers) == 1:
            return numbers.expand(count, -1)
        return numbers.repeat_interleave(high, 0)[skipped : skipped + count]


def scaled(
    where: Where,
    numbers: Array,
    scales: Mapped,
    zeros: Array | None = None,
    block: tuple[int, int] | None = None,
    groups: Mapped | None = None,
    factor: float = 1.0,
) -> Array:
    """The matrix, packable where a format of ours holds the same. `block` is the rectangle that the config names.

    Scales are one number, (out,), (out, 1), (out, groups of columns) or one a tile.
    """
    if len(numbers.shape) != 2 or len(scales.shape) > 2:
        raise CheckpointError(f"{where}: {list(scales.shape)} scales do not fit {list(numbers.shape)} numbers")
    scales = table(scales)
    (outputs, inputs), (down, across) = numbers.shape, scales.shape
    high, wide = (_share(*sizes) for sizes in zip(numbers.shape, scales.shape, block or (1, 1), strict=True))
    if min(outputs, inputs) < 1 or high * down < outputs or wide * across < inputs:
        raise CheckpointError(f"{where}: {down} x {across} scales do not fit {outputs} x {inputs} numbers")
    if zeros is not None and zeros.shape != scales.shape:
        raise CheckpointError(f"{where}: {list(zeros.shape)} zero points do not fit {list(scales.shape)} scales")
    if groups is not None:
        check(where, "weight_g_idx", groups, (inputs,), is_number=False)
        found = groups.read(0, 0, inputs)
        if not 0 <= int(found.min()) <= int(found.max()) < across:
            raise CheckpointError(f"{where}.weight_g_idx: names groups outside 0 to {across - 1}")
    matrix = ScaledMatrix(numbers, scales, zeros, (high, wide), groups, factor)
    form = matrix.fitting()
    return matrix if form is None else packable(matrix, form)


def _share(size: int, count: int, named: int) -> int:
    """How many of `size` numbers share one of `count` scales: `named` where that can be, else as many as divide it.

    0 where neither can be.
    """
    if count > 1 and -(-size // named) == count:
        return named
    return size // count if count and size % count == 0 else 0


class Fp8(Method):
    """8-bit floats with one scale for all, for each row or for each tile: transformers' fp8, FBGEMM's, AutoFP8's."""

    parts = ("weight", "weight_scale", "weight_scale_inv", *ACTIVATIONS)

    def __init__(self, settings: Settings) -> None:
        self.block = tile(settings, "weight_block_size")

    def matrix(self, where: Where, parts: Parts) -> Array:
        require(where, parts, "weight")
        if is_plain(parts["weight"]):
            return parts["weight"]
        numbers = eight_bits(where, parts["weight"])
        scale = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
        require(where, parts, scale)
        return scaled(where, numbers, parts[scale], block=self.block)


class CompressedTensors(Method):
    """The formats of vLLM's compressor that hold linear layers in integers or 8-bit floats.

    What it says of activations is not read: they are computed with as they are.
    """

    parts = (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *ACTIVATIONS,
    )
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
    widths = (2, 4, 8)  # others lie differently in older and newer files

    def __init__(self, settings: Settings) -> None:
        groups = sections(settings.section("config_groups"))
        for one in (settings, settings.section("sparsity_config"), *groups):
            named = None if one is None else one.text("format")
            if named is not None and named not in (*self.formats, "mixed-precision"):
                raise CheckpointError(
                    f"{settings.file}: quantization 'compressed-tensors' in format {shown(named)} is not supported; "
                    f"{', '.join(self.formats)} are"
                )
        transforms = settings.section("transform_config")
        if transforms is not None and sections(transforms.section("config_groups")):
            raise CheckpointError(f"{settings.file}: {settings.prefix}transform_config is not supported")
        weights = [one for group in groups if (one := group.section("weights")) is not None]
        tiles = [tile(one, "block_structure") for one in weights]
        tiles += [(1, size) for one in weights if (size := one.integer("group_size", low=-1) or 0) > 0]
        self.block = next(filter(None, tiles), None)

    def matrix(self, where: Where, parts: Parts) -> Array:
        zeros = parts.get("weight_zero_point")
        if "weight_packed" not in parts:
            require(where, parts, "weight")
            if is_plain(parts["weight"]):
                return parts["weight"]
            require(where, parts, "weight_scale")
            numbers = eight_bits(where, parts["weight"])
            return scaled(where, numbers, parts["weight_scale"], zeros and table(zeros), self.block)
        require(where, parts, "weight_shape", "weight_scale")
        check(where, "weight_shape", parts["weight_shape"], (2,), is_number=False)
        size = tuple(parts["weight_shape"].tensor.tolist())
        words = parts["weight_packed"]
        bits = next((bits for bits in self.widths if words.shape == self._words(size, bits)), None)
        if bits is None or words.dtype != torch.int32:
            raise CheckpointError(
                f"{where}.weight_packed: {words.stored} {list(words.shape)} is not {list(size)} in 2, 4 or 8 bits"
            )
        scales = parts["weight_scale"]
        if zeros is not None and zeros.dtype == torch.int32 and len(scales.shape) == 2:
            check(
                where,
                "weight_zero_point",
                zeros,
                self._words(scales.shape[::-1], bits)[::-1],
                is_number=False,
            )
            zeros = PackedIntegers(zeros, bits, scales.shape, dim=0)
        numbers = PackedIntegers(words, bits, size)
        return scaled(where, numbers, scales, zeros, self.block, parts.get("weight_g_idx"))

    @staticmethod
    def _words(size: tuple[int, ...], bits: int) -> tuple[int, ...]:
        """The shape of integers of this shape, packed into int32 along the last dimension."""
        return *size[:-1], -(-size[-1] * bits // 32)


def is_plain(weight: Mapped) -> bool:
    """Whether a weight is stored in numbers that a model can compute with."""
    return weight.tensor.is_floating_point() and weight.dtype.itemsize > 1


def eight_bits(where: Where, weight: Mapped) -> Mapped:
    """Raises CheckpointError unless it is stored in 8-bit integers or floats."""
    if weight.dtype not in (torch.int8, *FP8):
        raise CheckpointError(f"{where}.weight: is {weight.stored}; int8, {' or '.join(map(str, FP8))} is expected")
    return weight


def table(array: Mapped) -> Mapped:
    """One number, or one a row, as a column."""
    return array if len(array.shape) > 1 else Mapped(array.tensor.reshape(-1, 1), array.check)


def sections(settings: Settings | None) -> list[Settings]:
    """The objects of an object."""
    found = [] if settings is None else [settings.section(key) for key in settings.values]
    return [one for one in found if one is not None]


def tile(settings: Settings, key: str) -> tuple[int, int] | None:
    """The rows and columns that share a scale, from a config; None where it names none."""
    value = settings.values.get(key)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise settings.error(key, value, "two sizes are expected")
