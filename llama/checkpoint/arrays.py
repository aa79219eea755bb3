"""Stored arrays that are not in memory yet: what a reader finds in its files, and how a part of one is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..files.errors import CheckpointError
from ..files.mapped import map_pages
from ..kernels.formats import LowBitFormat


class Array(ABC):
    """A stored array. Parts are given as (dim, start, stop): everything along the other dimensions."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type that `read` gives."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in the file."""

    @property
    def stored(self) -> str:
        """Name of the stored type: "bfloat16", "float16", ... or a ggml block type such as "Q4_1"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def format(self) -> str | None:
        """The low-bit format of what a `PackedArray` holds; None for every other array."""
        return None

    @abstractmethod
    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """A part, on the CPU; may be the mapped memory itself."""

    def mapped(self, dim: int, start: int, stop: int) -> Tensor | None:
        """A part as the mapped memory itself, where it lies there in one piece; else None."""
        return None

    def copy_to(self, out: Tensor, dim: int, start: int, stop: int) -> None:
        """Writes a part into `out`, of the part's shape and any type, with no other copy of it where that can be."""
        out.copy_(self.read(dim, start, stop))

    def reordered(self, head_dim: int, reorder: Callable[[Tensor, int], Tensor]) -> Array:
        """The same with its rows in another rotary order, as `Reordered` describes it."""
        return Reordered(self, head_dim, reorder)


class PackedArray(Array):
    """A matrix in low-bit blocks: `packed` gives them as they are, `read` dequantizes them to float32."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    @abstractmethod
    def format(self) -> str:
        """The blocks' format, in lower case; may be one that only `read` knows."""

    @abstractmethod
    def packed(self, dim: int, start: int, stop: int) -> Tensor:
        """The blocks of a part, uint8 (rows, bytes of a row). Raises CheckpointError inside a block."""


def read_by_copy(array: Array, dim: int, start: int, stop: int) -> Tensor:
    """A part of an array whose `copy_to` does the work."""
    shape = list(array.shape)
    shape[dim] = stop - start
    out = torch.empty(shape, dtype=array.dtype)
    array.copy_to(out, dim, start, stop)
    return out


@dataclass(frozen=True)
class Mapped(Array):
    """An array that lies in a mapped file as it is; parts are views, never copies."""

    tensor: Tensor
    check: Callable[[], None] = lambda: None
    """Raises if the file has become shorter since it was mapped: touching the view would kill the process."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        self.check()
        part = self.tensor.narrow(dim, start, stop - start)
        if part.is_contiguous():
            map_pages(part)
        return part

    def mapped(self, dim: int, start: int, stop: int) -> Tensor | None:
        is_whole = self.tensor.narrow(dim, start, stop - start).is_contiguous()
        return self.read(dim, start, stop) if is_whole else None


@dataclass(frozen=True)
class Joined(Array):
    """An array stored in several pieces, one after the other along `along`."""

    pieces: tuple[Array, ...]
    along: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        shape[self.along] = sum(piece.shape[self.along] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        part = self.mapped(dim, start, stop)
        if part is None:
            part = read_by_copy(self, dim, start, stop)
        return part

    def mapped(self, dim: int, start: int, stop: int) -> Tensor | None:
        overlaps = list(self._overlaps(dim, start, stop))
        return overlaps[0][0].mapped(*overlaps[0][1]) if len(overlaps) == 1 else None

    def copy_to(self, out: Tensor, dim: int, start: int, stop: int) -> None:
        offset = 0
        for piece, part in self._overlaps(dim, start, stop):
            length = part[2] - part[1] if dim == self.along else piece.shape[self.along]
            piece.copy_to(out.narrow(self.along, offset, length), *part)
            offset += length

    def _overlaps(self, dim: int, start: int, stop: int) -> Iterator[tuple[Array, tuple[int, int, int]]]:
        """Each piece that has some of the part, and what it has."""
        offset = 0
        for piece in self.pieces:
            if dim != self.along:
                yield piece, (dim, start, stop)
                continue
            first, last = max(start - offset, 0), min(stop - offset, piece.shape[dim])
            if first < last:
                yield piece, (dim, first, last)
            offset += piece.shape[dim]


@dataclass(frozen=True)
class Wrapped(Array):
    """Another array, changed as it is read: of the same shape, type and size."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


@dataclass(frozen=True)
class Reordered(Wrapped):
    """Rows of another array in another rotary order, head by head.

    `reorder` gives whole heads, (heads * head_dim, ...), as a view (heads, ..., ...) that has the new order.
    """

    head_dim: int
    reorder: Callable[[Tensor, int], Tensor]

    @property
    def stored(self) -> str:
        return self.array.stored

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        if dim != 0:
            return self._view(dim, start, stop).flatten(0, 2)
        first = start // self.head_dim * self.head_dim  # whole heads, then the rows asked for
        last = -(-stop // self.head_dim) * self.head_dim
        return self._view(0, first, last).flatten(0, 2).narrow(0, start - first, stop - start)

    def copy_to(self, out: Tensor, dim: int, start: int, stop: int) -> None:
        if dim == 0 and (start % self.head_dim or stop % self.head_dim):
            super().copy_to(out, dim, start, stop)
            return
        view = self._view(dim, start, stop)
        out.unflatten(0, view.shape[:3]).copy_(view)

    def _view(self, dim: int, start: int, stop: int) -> Tensor:
        return self.reorder(self.array.read(dim, start, stop), self.head_dim)


@dataclass(frozen=True)
class LowBitMatrix(PackedArray):
    """A matrix in blocks of one of FORMATS; `read` dequantizes it to float32."""

    blocks: Array  # uint8 (rows, bytes of a row)
    form: LowBitFormat

    @property
    def format(self) -> str:
        return self.form.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.blocks.shape[1] // self.form.block_bytes * self.form.block

    @property
    def stored(self) -> str:
        return self.format

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        if dim == 0:
            return self.form.dequantize(self.packed(0, start, stop))
        return self.form.dequantize(self.packed(0, 0, self.shape[0])).narrow(1, start, stop - start)

    def reordered(self, head_dim: int, reorder: Callable[[Tensor, int], Tensor]) -> LowBitMatrix:
        return replace(self, blocks=self.blocks.reordered(head_dim, reorder))

    def packed(self, dim: int, start: int, stop: int) -> Tensor:
        if dim == 0:
            return self.blocks.read(0, start, stop)
        block, scale = self.form.block, self.form.block_bytes
        if start % block or stop % block:
            raise CheckpointError(
                f"columns {start} to {stop} are not whole {self.format} blocks of {block}: "
                "use fewer ranks, or another format"
            )
        return self.blocks.read(1, start // block * scale, stop // block * scale).contiguous()
