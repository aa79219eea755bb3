"""What every reader yields: weights that know their name, shape and stored type, and are read only when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import CheckpointError
from ..files.writing import Entry
from ..parallel import share
from .arrays import Array, PackedArray
from .inventory import EMBEDDING, OUTPUT


@dataclass(frozen=True)
class Weight:
    """One weight, or one rank's part of it, with Meta's name and in Meta's rotary order; read lazily."""

    name: str
    array: Array
    file: Path
    cut: tuple[int, int, int] | None = None
    """The part of `array` that this is: (dimension, start, stop); None: all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole weight's shape; of a part, the part's."""
        shape = list(self.array.shape)
        if self.cut:
            dim, start, stop = self.cut
            shape[dim] = stop - start
        return tuple(shape)

    @property
    def stored(self) -> str:
        """Name of the stored type, such as "bfloat16" or "Q4_1"."""
        return self.array.stored

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        whole = prod(self.array.shape)
        return self.array.nbytes * prod(self.shape) // whole if whole else 0

    @property
    def dtype(self) -> torch.dtype:
        """The type that `read` gives: the stored one, float32 for low-bit blocks."""
        return self.array.dtype

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as numbers of the type that `read` gives."""
        return self.stored == str(self.dtype).removeprefix("torch.")

    @property
    def is_packed(self) -> bool:
        """Whether it is stored in low-bit blocks, so that `read_packed` works."""
        return self.format is not None

    @property
    def format(self) -> str | None:
        """The low-bit format of what `read_packed` gives, in lower case; None where it does not work."""
        return self.array.format

    def part(self, dim: int | None, rank: int, world_size: int) -> Weight:
        """What `rank` of `world_size` holds of this weight, cut along `dim` (None: all of it)."""
        if dim is None or world_size == 1:
            return self
        length = self.shape[dim]
        if self.cut or (length % world_size and not (dim == 0 and self.name in (EMBEDDING, OUTPUT))):
            raise CheckpointError(
                f"{self.file}: {self.name}: dimension {dim} of {list(self.shape)} cannot be cut for {world_size} ranks"
            )
        return replace(self, cut=(dim, *share(length, rank, world_size)))

    def read(self, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The weight, or its `start:stop` along `dim`, in the stored type (low-bit blocks: float32), on the CPU.

        May be a view of the mapped file; writing into it changes nothing on disk. Bytes outside the part are not
        read where the format allows that.
        """
        return self._read(self.array.read, dim, start, stop)

    def mapped(self) -> Tensor | None:
        """All of it as the mapped memory itself, where it lies there in one piece; else None."""
        return self._read(self.array.mapped, None, 0, None)

    def copy_to(self, out: Tensor) -> None:
        """Writes all of it into `out`, of its shape and any type, with no other copy of it where that can be."""
        dim, start, stop = self.cut or (0, 0, self.shape[0])
        self._guarded(self.array.copy_to, out, dim, start, stop)

    def read_packed(self, dim: int | None = None, start: int = 0, stop: int | None = None) -> tuple[Tensor, str]:
        """The low-bit blocks, uint8 (rows, bytes per row), and the name of the stored type, such as "Q4_0".

        `start` and `stop` count weights, not bytes; along dimension 1 they must fall between blocks.
        """
        if not isinstance(self.array, PackedArray):
            raise CheckpointError(f"{self.file}: {self.name}: is stored as {self.stored}, not in low-bit blocks")
        if self.cut and dim not in (None, self.cut[0]):
            raise ValueError(f"{self.name}: is cut along dimension {self.cut[0]} and cannot be cut along {dim} as well")
        return self._read(self.array.packed, dim, start, stop), self.stored

    def entry(self, name: str, dtype: torch.dtype) -> Entry:
        """What a file to be written says of it, under another name and in another type."""
        return Entry(name, self.shape, dtype, self.read)

    def _read(self, read: Callable[..., Any], dim: int | None, start: int, stop: int | None) -> Any:
        """What `read` gives for a part of this part."""
        dim = (self.cut[0] if self.cut else 0) if dim is None else dim
        stop = self.shape[dim] if stop is None else stop
        if not 0 <= start <= stop <= self.shape[dim]:
            raise ValueError(f"{self.name}: {start}:{stop} is outside dimension {dim} of {list(self.shape)}")
        if self.cut is None:
            return self._guarded(read, dim, start, stop)
        cut_dim, first, last = self.cut
        if dim == cut_dim:
            return self._guarded(read, dim, first + start, first + stop)
        return self._guarded(read, cut_dim, first, last).narrow(dim, start, stop - start)

    def _guarded(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Names the file and the weight in whatever is wrong with it."""
        try:
            return work(*arguments)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {self.name}: {error}") from error
