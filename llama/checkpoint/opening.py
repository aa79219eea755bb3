"""Opening a checkpoint of whatever format, told by content."""

from __future__ import annotations

from pathlib import Path

from . import gguf, huggingface, meta
from .hub import resolve
from .weight import Checkpoint, CheckpointError

READERS = (
    # what recognises a path by its content, what opens it
    (meta.recognises, meta.open_meta),
    (huggingface.recognises, huggingface.open_huggingface),
    (gguf.recognises, gguf.open_gguf),
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format, or `org/name` of the hub: its settings are parsed, its weights stay on disk.

    Raises FileNotFoundError where nothing is at `path`, CheckpointError for what is no checkpoint or a damaged one.
    """
    path = resolve(path)
    for recognises, open_path in READERS:
        if recognises(path):
            return open_path(path)
    raise CheckpointError(f"{path}: no checkpoint found; {_expectation(path)}")


def _expectation(path: Path) -> str:
    if path.is_file():
        return "a file must be GGUF; for .pth, .bin and .safetensors give their directory"
    return (
        "a directory must hold params.json with consolidated.NN.pth, config.json with .safetensors or .bin files, "
        "or a .gguf file"
    )
