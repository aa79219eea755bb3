"""Where a checkpoint keeps its tokenizer."""

from __future__ import annotations

from pathlib import Path

NAMES = ("tokenizer.model", "tokenizer.json")


def find_tokenizer(path: Path, names: tuple[str, ...] = NAMES) -> Path | None:
    """The tokenizer inside the checkpoint directory or one directory above it (Meta's layout)."""
    for folder in (path, path.absolute().parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None
