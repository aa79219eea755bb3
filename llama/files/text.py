"""Text files, in an encoding that is known."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError
from .mapped import open_file


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text in `path`. Raises CheckpointError that names the first byte that is not in `encoding`."""
    with open_file(path) as file:
        data = file.read()
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: byte {error.start} is 0x{data[error.start]:02x}, which is not {encoding}: {error.reason}"
        ) from error
    except LookupError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
