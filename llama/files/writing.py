"""What is to be written, as data: tensors that are read when their turn comes, and the files that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import CheckpointError

Progress = Callable[[int], None]
"""Called with the bytes of each tensor that has been written."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written: what its header says, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def write(self, file: IO[bytes]) -> None:
        """Appends its bytes; raises CheckpointError where a value does not fit into the type."""
        tensor = self.read()
        if tuple(tensor.shape) != self.shape:
            raise CheckpointError(f"{self.name}: has shape {list(tensor.shape)}, expected {list(self.shape)}")
        converted = tensor.to(self.dtype)
        if self.dtype == torch.float16 and bool((converted.isinf() & ~tensor.isinf()).any()):
            raise CheckpointError(f"{self.name}: holds values beyond float16's 65504; choose bf16 or fp32")
        file.write(converted.contiguous().flatten().view(torch.uint8).numpy())


Writer = Callable[[Path, Sequence[Entry], Mapping[str, Any], Progress], None]
"""Writes one file of tensors, one at a time; the mapping is what the container keeps beside them."""


@dataclass
class Plan:
    """The files of a new checkpoint, decided before the first byte is written; small files are kept as bytes."""

    tensor_files: dict[str, list[Entry]]
    small_files: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    """What each tensor file keeps beside its tensors."""
    warnings: list[str] = field(default_factory=list)
    """What the reference code or another program will not understand of it, one line each."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory of files; else its only tensor file, whose name is "", is all there is."""
        return "" not in self.tensor_files

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entries in self.tensor_files.values() for entry in entries)

    def write(self, path: Path, write_tensors: Writer, progress: Progress) -> None:
        """Writes everything at `path`: a new directory, or the one tensor file itself."""
        for name, entries in self.tensor_files.items():
            write_tensors(path / name, entries, self.metadata, progress)
        for name, data in self.small_files.items():
            (path / name).write_bytes(data)
