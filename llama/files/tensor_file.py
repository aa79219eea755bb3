"""A file of named tensors, PyTorch's zip or safetensors, told apart by content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .mapped import open_file
from .safetensors import read_safetensors
from .torch_zip import read_torch_file


class TensorFile(NamedTuple):
    """Tensors as views of the mapped file; `check` raises once the file has become shorter than it was."""

    path: Path
    tensors: dict[str, Tensor]
    check: Callable[[], None]


def read_tensor_file(path: Path) -> TensorFile:
    """Maps a `.pth`, `.bin` or `.safetensors` file; raises CheckpointError for a foreign or damaged one."""
    with open_file(path) as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{" or (path.suffix == ".safetensors" and start[:2] != b"PK")
    tensors, check = (read_safetensors if is_safetensors else read_torch_file)(path)
    return TensorFile(path, tensors, check)
