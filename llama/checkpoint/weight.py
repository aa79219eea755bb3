"""What every reader yields: weights that know their name, shape and stored type, and are read only when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model import ModelArgs

MAX_LINE = 2000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line that names the file and, where there is one, the tensor.

    Names come from the file, so what a terminal would not print as it is becomes "?", and long lines are cut.
    """

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else "?" for char in message)
        super().__init__(line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "...")


class Array(Protocol):
    """A stored array that is not in memory yet."""

    shape: tuple[int, ...]
    stored: str
    """Name of the stored type: "bfloat16", "float16", ... or a ggml block type such as "Q4_1"."""
    nbytes: int

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """The part `start:stop` along `dim`; the mapped memory itself where that is possible."""
        ...


@dataclass(frozen=True)
class Mapped:
    """An array that lies in a mapped file as it is; parts are views, never copies."""

    tensor: Tensor
    check: Callable[[], None] = lambda: None
    """Raises if the file has become shorter since it was mapped: touching the view would kill the process."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def stored(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        self.check()
        return self.tensor.narrow(dim, start, stop - start)


@dataclass(frozen=True)
class Joined:
    """Arrays stored in several pieces, one after the other along `dim`."""

    pieces: tuple[Array, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def stored(self) -> str:
        return self.pieces[0].stored

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        parts = [piece.read(*within) for piece, within in self._overlaps(dim, start, stop)]
        if not parts:
            return self.pieces[0].read(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def _overlaps(self, dim: int, start: int, stop: int) -> Iterator[tuple[Array, tuple[int, int, int]]]:
        offset = 0
        for piece in self.pieces:
            if dim != self.dim:
                yield piece, (dim, start, stop)
                continue
            length = piece.shape[dim]
            first, last = max(start - offset, 0), min(stop - offset, length)
            if first < last:
                yield piece, (dim, first, last)
            offset += length


@dataclass(frozen=True)
class Reordered:
    """Rows of another array in another rotary order, head by head; `reorder` maps (rows, ...) to (rows, ...)."""

    array: Array
    head_dim: int
    reorder: Callable[[Tensor, int], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def stored(self) -> str:
        return self.array.stored

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        if dim != 0:
            return self.reorder(self.array.read(dim, start, stop), self.head_dim)
        first = start // self.head_dim * self.head_dim  # whole heads, then the rows asked for
        last = -(-stop // self.head_dim) * self.head_dim
        heads = self.reorder(self.array.read(0, first, last), self.head_dim)
        return heads.narrow(0, start - first, stop - start)


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
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def is_packed(self) -> bool:
        """Whether it is stored in low-bit blocks, so that `read_packed` works."""
        return hasattr(self.array, "packed")

    def part(self, dim: int | None, rank: int, world_size: int) -> Weight:
        """What `rank` of `world_size` holds of this weight, cut along `dim` (None: all of it)."""
        if dim is None or world_size == 1:
            return self
        size, rest = divmod(self.shape[dim], world_size)
        if rest or self.cut:
            raise CheckpointError(
                f"{self.file}: {self.name}: dimension {dim} of {list(self.shape)} cannot be cut for {world_size} ranks"
            )
        return replace(self, cut=(dim, rank * size, (rank + 1) * size))

    def read(self, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The weight, or its `start:stop` along `dim`, in the stored type (low-bit blocks: float32), on the CPU.

        May be a view of the mapped file; writing into it changes nothing on disk. Bytes outside the part are not
        read where the format allows that.
        """
        return self._read(self.array.read, dim, start, stop)

    def read_packed(
        self, dim: int | None = None, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, str]:
        """The stored blocks untouched: uint8 (rows, bytes per row), and the block type's name, such as "Q4_0".

        `start` and `stop` count weights, not bytes; along dimension 1 they must fall between blocks.
        """
        if not self.is_packed:
            raise CheckpointError(
                f"{self.file}: {self.name}: is stored as {self.stored}, not in low-bit blocks"
            )
        if self.cut and dim not in (None, self.cut[0]):
            raise ValueError(
                f"{self.name}: is cut along dimension {self.cut[0]} and cannot be cut along {dim} as well"
            )
        return self._read(self.array.packed, dim, start, stop), self.stored  # type: ignore[attr-defined]

    def _read(self, read: Callable[[int, int, int], Tensor], dim: int | None, start: int, stop: int | None):
        dim = (self.cut[0] if self.cut else 0) if dim is None else dim
        stop = self.shape[dim] if stop is None else stop
        if not 0 <= start <= stop <= self.shape[dim]:
            raise ValueError(f"{self.name}: {start}:{stop} is outside dimension {dim} of {list(self.shape)}")
        try:
            if self.cut is None:
                return read(dim, start, stop)
            cut_dim, first, last = self.cut
            if dim == cut_dim:
                return read(dim, first + start, first + stop)
            return read(cut_dim, first, last).narrow(dim, start, stop - start)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {self.name}: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its shape and settings are parsed, its weights are headers only until they are read."""

    path: Path
    format: str
    """"meta", "hf" or "gguf"."""
    args: ModelArgs
    """`max_seq_len` is the model's context where the checkpoint or its family tells it."""
    weights: Callable[[], Iterator[Weight]]
    """A new iterator over all weights, in canonical names and rotary order."""
    dtype: torch.dtype | None
    """The type that most stored bytes have; None where low-bit blocks dominate."""
    tokenizer_path: Path | None = None
    generation_defaults: dict[str, float] = field(default_factory=dict)
    """`temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, as far as the checkpoint gives them."""
    stop_ids: tuple[int, ...] = ()
    unknown_keys: tuple[str, ...] = ()
    """Settings that nothing here reads, for the loader to print."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The parsed header as it was found: params.json, config.json or scalar GGUF metadata."""


def dominant_dtype(weights: Iterator[Weight]) -> torch.dtype | None:
    """The torch type holding most of the stored bytes; None for low-bit blocks."""
    totals: dict[str, int] = {}
    for weight in weights:
        totals[weight.stored] = totals.get(weight.stored, 0) + weight.nbytes
    most = max(totals, key=lambda stored: totals[stored], default="float32")
    dtype = getattr(torch, most, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None
