"""What a quantization method of another program is, and what its matrices have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...files.errors import CheckpointError
from ...kernels.bits import unpack_bits
from ...kernels.formats import LowBitFormat, row_chunks
from ..arrays import Array, LowBitMatrix, Mapped, read_by_copy
from ..settings import Settings


class Where(NamedTuple):
    """A linear layer in a file, as errors name it."""

    file: Path
    module: str

    def __str__(self) -> str:
        return f"{self.file}: {self.module}"


Parts = Mapping[str, Mapped]
"""A module's stored tensors by the last part of their names."""


class Method(ABC):
    """How a program stores a linear layer's matrix: as `module.part` for some of `parts`, for `module.weight`.

    A new method is a class with `parts`, `__init__` (settings of `quantization_config` -> what the layout depends on;
    CheckpointError for a variant that is not read) and `matrix`, and a row in METHODS.
    """

    parts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, settings: Settings) -> None:
        """What the method's settings say of the layout."""

    @abstractmethod
    def matrix(self, where: Where, parts: Parts) -> Array:
        """The matrix (out, in) that the parts stand for, nothing but small ones read.

        Raises CheckpointError, which begins with `where`, for parts that do not fit together.
        """


class QuantizedMatrix(Array):
    """A linear layer's matrix (out, in) in integers; `read` dequantizes it to float32.

    Where a format of ours holds the same codes and scales, `fields` gives them in its blocks.
    """

    by_inputs: ClassVar[bool] = False
    """Whether what lies together is of some inputs and all outputs, and not of some outputs and all inputs."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @abstractmethod
    def values(self, rows: slice) -> Tensor:
        """Some rows, dequantized: float32 (rows, in)"""

    def fields(self, rows: slice, columns: slice, form: LowBitFormat) -> tuple[Tensor, ...]:
        """What the format's `pack` takes, of whole blocks: codes uint8 (rows, blocks, block), others (.., .., 1)."""
        raise NotImplementedError

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        return read_by_copy(self, dim, start, stop)

    def copy_to(self, out: Tensor, dim: int, start: int, stop: int) -> None:
        first, last = (start, stop) if dim == 0 else (0, self.shape[0])
        whole = [slice(0, last - first)]
        for part in whole if self.by_inputs else row_chunks(last - first, self.shape[1]):
            values = self.values(slice(first + part.start, min(first + part.stop, last)))
            out[part] = values if dim == 0 else values[:, start:stop]


@dataclass(frozen=True)
class Repacked(Array):
    """A quantized matrix in blocks of a format of ours, converted as it is read: uint8 (out, bytes of a row)."""

    matrix: QuantizedMatrix
    form: LowBitFormat
    dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, inputs = self.matrix.shape
        return outputs, self.form.packed_columns(inputs)

    @property
    def stored(self) -> str:
        return self.matrix.stored

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        rows, columns = (range(start, stop) if dim == axis else range(self.shape[axis]) for axis in (0, 1))
        size, block = self.form.block_bytes, self.form.block
        blocks = range(columns.start // size, columns.stop // size)
        out = torch.empty((len(rows), len(blocks), size), dtype=torch.uint8)
        for some_rows, some_blocks in self._parts(len(rows), len(blocks)):
            row, column = rows[some_rows], blocks[some_blocks]
            columns = slice(column.start * block, column.stop * block)
            fields = self.matrix.fields(slice(row.start, row.stop), columns, self.form)
            packed = self.form.pack(*(field.flatten(0, 1) for field in fields))
            out[some_rows, some_blocks] = packed.view(len(row), len(column), size)
        return out.flatten(1)

    def _parts(self, rows: int, blocks: int) -> Iterator[tuple[slice, slice]]:
        """Some rows and blocks at a time, such that what lies together is read together."""
        if self.matrix.by_inputs:
            return ((slice(0, rows), part) for part in row_chunks(blocks, self.form.block * rows))
        return ((part, slice(0, blocks)) for part in row_chunks(rows, self.form.block * blocks))


@dataclass(frozen=True)
class PackableMatrix(LowBitMatrix):
    """A quantized matrix as a weight that can stay packed; it bears its method's name for what is stored."""

    @property
    def stored(self) -> str:
        return self.blocks.stored


def packable(matrix: QuantizedMatrix, form: LowBitFormat) -> PackableMatrix:
    """A matrix whose codes and scales `form` holds as they are."""
    return PackableMatrix(Repacked(matrix, form), form)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 (n, m), each row one string of bits, the lowest first -> uint8 (n, m * 32 / bits)"""
    data = packed.contiguous().view(torch.uint8)
    if 8 % bits:
        places = 1 << torch.arange(bits, dtype=torch.uint8)
        return (unpack_bits(data).unflatten(-1, (-1, bits)) * places).sum(-1, dtype=torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (data.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)


def are_halves(scales: Array) -> bool:
    """Whether float16 holds every one of these numbers as it is."""
    if scales.dtype == torch.float16:
        return True
    numbers = scales.read(0, 0, scales.shape[0])
    return torch.equal(numbers.half().to(numbers.dtype), numbers)


def require(where: Where, parts: Parts, *names: str) -> None:
    """Raises CheckpointError for the first of these parts that is missing."""
    for name in names:
        if name not in parts:
            raise CheckpointError(f"{where}.{name}: is missing")


def check(where: Where, part: str, array: Mapped, shape: tuple[int, ...], is_number: bool) -> None:
    """Raises CheckpointError unless a part has this shape, and is of a floating type or not."""
    if array.shape != shape or array.tensor.is_floating_point() != is_number:
        raise CheckpointError(f"{where}.{part}: is {array.stored} {list(array.shape)}, expected {list(shape)}")
