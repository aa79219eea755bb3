"""A folder of models, each of any format, called by the names that they have there."""

from __future__ import annotations

from pathlib import Path

from ..files.errors import CheckpointError
from .adapters import is_adapter, parse_weighted
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


def adapters_in(folder: Path) -> dict[str, Path]:
    """By name, the folder's adapters: directories, and GGUF files without their suffix.

    Raises FileNotFoundError where there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; give a folder of adapters")
    found = {path.stem if path.is_file() else path.name: path for path in sorted(folder.iterdir())}
    return {name: path for name, path in found.items() if is_adapter(path) and _is_inside(folder, path)}


def adapter_in(folder: Path, name: str) -> Path:
    """The folder's adapter of that name, or at that path, which is inside it once all links are followed.

    Raises FileNotFoundError where it has none, CheckpointError for a path that leads out of it.
    """
    path = folder / name
    if not _is_inside(folder, path):
        raise CheckpointError(f"{name[:200]!r} leads out of the folder of adapters: give the name of one in it")
    path = path if path.exists() else path.with_name(path.name + ".gguf")
    if not is_adapter(path) or not _is_inside(folder, path):
        there = ", ".join(adapters_in(folder)) or "none"
        raise FileNotFoundError(f"no adapter {name[:200]!r} is in the folder of adapters; there are: {there}")
    return path


def located_adapter(given: str, folder: Path | None) -> str | None:
    """Where "PATH", or "PATH=0.7", is: as it is given, or by its name in the folder; None where there is no such."""
    path, weight = parse_weighted(given)
    if path and Path(path).expanduser().exists():
        return given
    if not path or folder is None or not is_adapter(folder / path):
        return None
    return str(folder / path) if path == given else f"{folder / path}={weight!r}"


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a path, and all files of a directory, are in a folder, wherever links lead."""
    root = folder.resolve()
    paths = [path, *path.iterdir()] if path.is_dir() else [path]
    return path.resolve() != root and all(one.resolve().is_relative_to(root) for one in paths)
