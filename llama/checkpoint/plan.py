"""What a conversion will write, as data: every file with its tensors, decided before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.writing import Entry, Progress, Writer


@dataclass
class Plan:
    """The files of a new checkpoint. `write_tensors` writes one tensor file; small files are kept as bytes."""

    write_tensors: Writer
    tensor_files: dict[str, list[Entry]]
    is_directory: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)
    small_files: dict[str, bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What the reference code or another program will not understand of it, one line each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for outputs in self.tensor_files.values() for output in outputs)

    def write(self, path: Path, progress: Progress) -> None:
        """Writes everything at `path`: a new directory, or the one tensor file itself."""
        for name, outputs in self.tensor_files.items():
            self.write_tensors(path / name if self.is_directory else path, outputs, self.metadata, progress)
        for name, data in self.small_files.items():
            (path / name).write_bytes(data)
