"""Checkpoints of every format: open one, fill a model from it, write another."""

from __future__ import annotations

from pathlib import Path

from . import gguf, huggingface, meta
from .default import default_model
from .load import load_weights
from .shapes import expected_shapes
from .weight import Checkpoint, CheckpointError, Weight

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Weight",
    "default_model",
    "expected_shapes",
    "load_weights",
    "open_checkpoint",
]

READERS = (
    # what recognises a path by its content, what opens it
    (meta.recognises, meta.open_meta),
    (huggingface.recognises, huggingface.open_huggingface),
    (gguf.recognises, gguf.open_gguf),
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format: its settings are parsed, its weights stay on disk until they are read.

    Raises FileNotFoundError where nothing is at `path`, CheckpointError for what is no checkpoint or a damaged one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or directory; give a checkpoint's directory or a .gguf file"
        )
    for recognises, open_path in READERS:
        if recognises(path):
            return open_path(path)
    raise CheckpointError(f"{path}: no checkpoint found; {_expectation(path)}")


def _expectation(path: Path) -> str:
    if path.is_file():
        return "a file must be GGUF; for .pth and .safetensors give their directory"
    return (
        "a directory must hold params.json with consolidated.NN.pth, config.json with .safetensors or .bin files, "
        "or a .gguf file"
    )
