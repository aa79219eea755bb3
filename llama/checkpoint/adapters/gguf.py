"""LoRA adapters in GGUF, as llama.cpp's converter writes them: rows are in Meta's rotary order already."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...files.errors import CheckpointError, shown
from ...files.gguf import GGUFFile
from ...files.mapped import open_file
from ..formats.gguf import array_of
from ..inventory import EMBEDDING, FROM_GGUF, rename
from ..settings import Settings
from .adapter import Adapter, low_rank_of


def is_gguf_adapter(path: Path) -> bool:
    """Whether `path` is a GGUF file that holds an adapter and no model."""
    if not path.is_file():
        return False
    with open_file(path) as file:
        if file.read(4) != b"GGUF":
            return False
    return GGUFFile(path).scalars().get("general.type") == "adapter"


def open_gguf_adapter(path: Path) -> Adapter:
    """Opens an adapter. Raises CheckpointError for kinds other than LoRA and for architectures other than llama."""
    file = GGUFFile(path)
    settings = Settings(file.scalars(), path)
    kind, architecture = settings.text("adapter.type", "lora"), settings.text("general.architecture", "llama")
    if kind != "lora" or architecture != "llama":
        what = kind if kind != "lora" else architecture
        raise CheckpointError(f"{path}: an adapter of {shown(what)} is not supported; lora for llama is")
    alpha = settings.number("adapter.lora.alpha", 0.0, low=-1e30)
    parts: dict[str, dict[str, Tensor]] = {}
    for header in file.tensors.values():
        stored, _, part = header.name.rpartition(".lora_")
        if part not in ("a", "b"):
            raise CheckpointError(f"{path}: {shown(header.name)}: is no part of a LoRA adapter")
        name = rename(stored, FROM_GGUF) or stored
        tensor = array_of(file, header).read(0, 0, header.shape[0])
        if name == EMBEDDING:  # a row of A is a token's there
            part, tensor = {"a": "b", "b": "a"}[part], tensor.mT if part == "b" else tensor
        parts.setdefault(name.removesuffix(".weight"), {})[part] = tensor
    if not parts:
        raise CheckpointError(f"{path}: holds no tensors")
    low_rank = {name: low_rank_of(path, name, those, alpha or None) for name, those in parts.items()}
    base = settings.text("general.base_model.0.name")
    return Adapter(path, "gguf", (path,), low_rank, base=base, is_half_split=False)
