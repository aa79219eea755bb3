"""What a conversion will write, as data: every file with its tensors, decided before the first byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.output import Output, Progress

Writer = Callable[[Path, Sequence[Output], Progress], None]


@dataclass
class Plan:
    """The files of a new checkpoint. `write_tensors` writes one tensor file; small files are kept as bytes."""

    write_tensors: Writer
    tensor_files: dict[str, list[Output]]
    is_directory: bool = True
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
            self.write_tensors(path / name if self.is_directory else path, outputs, progress)
        for name, data in self.small_files.items():
            (path / name).write_bytes(data)


def json_bytes(value: dict[str, Any]) -> bytes:
    """A JSON file's content, keys in the order given."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
