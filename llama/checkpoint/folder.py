"""A folder of models, each of any format, called by the names that they have there."""

from __future__ import annotations

from pathlib import Path

from .formats import FORMATS


def models_in(folder: Path, only: str | None = None) -> dict[str, Path]:
    """By name, the folder's checkpoints: directories, and GGUF files without their suffix.

    With `only` none but that one is looked into. Raises FileNotFoundError where there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; give a folder of models")
    found = {path.stem if path.is_file() else path.name: path for path in sorted(folder.iterdir())}
    return {
        name: path
        for name, path in found.items()
        if only in (None, name) and any(row.recognise(path) for row in FORMATS.values())
    }


def model_in(folder: Path, name: str | None) -> Path:
    """The one of that name, or the only one. Raises FileNotFoundError, which names those that there are."""
    found = models_in(folder)
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name in found:
        return found[name]
    which = "which model" if name is None else f"no model is called {name}"
    raise FileNotFoundError(f"{folder}: {which}; give one of {', '.join(found) or 'none, as none is there'}")
