"""What a package depends on. It is native code for one processor and calls operators by their schemas, so it runs only
where all of this is the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.embedding import LowBitEmbedding
from llama.files.errors import CheckpointError, shown
from llama.kernels import library
from llama.quantization import LowBitLinear
from llama.version import VERSION

from .graph import StepGraph

TRACED = ("attention.py", "embedding.py", "linear.py", "model.py", "quantization.py", "rotary.py")
FOLDERS = ("kernels", "compiled")  # and those above: what a graph is traced from


@dataclass(frozen=True)
class Fingerprint:
    llama: str
    torch: str
    system: str
    instructions: str  # what the processor has, names with spaces between
    kernels: str  # a digest of the compiled library
    sources: str  # a digest of the code that the graph is traced from
    model: str  # a digest of its shape, and of each weight's shape, type and layout; never of their values

    @classmethod
    def of(cls, graph: StepGraph) -> Fingerprint:
        """Of this graph on this machine."""
        return cls(
            llama=VERSION,
            torch=torch.__version__,
            system=f"{platform.system()} {platform.machine()}",
            instructions=" ".join(instructions()),
            kernels=short_digest(library.PATH.read_bytes()),
            sources=digest_of_sources(),
            model=digest_of_graph(graph),
        )

    @classmethod
    def from_json(cls, values: Any, path: Path) -> Fingerprint:
        """Raises CheckpointError, which names `path`, for what is none."""
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: says nothing of what the package was made with")
        for field in fields(cls):
            if not isinstance(values.get(field.name), str):
                raise CheckpointError(f"{path}: {field.name} is {shown(values.get(field.name))}, and should be a text")
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @property
    def key(self) -> str:
        """Short, and another one wherever anything differs."""
        return short_digest(json.dumps(self.to_json(), sort_keys=True).encode())

    def misfit(self, here: Fingerprint) -> str | None:
        """Why a package of this fingerprint does not run where `here` is wanted, in a few words; None where it does."""
        for name, what in (("torch", "torch"), ("llama", "llama"), ("system", "a system like")):
            made, found = getattr(self, name), getattr(here, name)
            if made != found:
                return f"it was compiled with {what} {made}, and this is {found}"
        missing = sorted(set(self.instructions.split()) - set(here.instructions.split()))
        if missing:
            return f"it was compiled for a processor with {', '.join(missing)}, which this one lacks"
        if self.kernels != here.kernels:
            return "it was compiled with other kernels (llama/kernels), which were built anew since"
        if self.sources != here.sources:
            return "it was compiled from other code of the model, which was changed since"
        if self.model != here.model:
            return "it was compiled for another model, or for other types of its numbers"
        return None


def short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@cache
def instructions() -> tuple[str, ...]:
    """The processor's instruction sets: a package is compiled for all that its machine has."""
    found = torch.cpu.get_capabilities()
    return tuple(sorted(name for name, value in found.items() if value is True))


@cache
def digest_of_sources() -> str:
    package = Path(__file__).parent.parent
    files = [package / name for name in TRACED]
    files += [file for folder in FOLDERS for file in sorted((package / folder).glob("*.py"))]
    return short_digest(b"\0".join(file.read_bytes() for file in files))


def digest_of_graph(graph: StepGraph) -> str:
    args = asdict(graph.model.params)
    del args["max_batch_size"], args["max_seq_len"], args["sliding_window"]  # which the graph does not know
    scaling = graph.model.params.rope_scaling
    weights = {name: layout(tensor) for name, tensor in graph.weights().items()}
    said = [args, None if scaling is None else scaling.kind, str(graph.kv_dtype), weights, dict(low_bit_modules(graph))]
    return short_digest(json.dumps(said, sort_keys=True).encode())


def layout(tensor: Tensor) -> list[Any]:
    """Whatever of a weight its values do not tell."""
    strides = list(tensor.stride()) if tensor.layout == torch.strided else str(tensor.layout)
    return [str(tensor.dtype), list(tensor.shape), strides]


def low_bit_modules(graph: StepGraph) -> Iterator[tuple[str, list[str]]]:
    """By name, what a packed weight's bytes mean."""
    for name, module in graph.named_modules():
        if isinstance(module, LowBitLinear):
            yield name, [module.format.name, module.variant]
        elif isinstance(module, LowBitEmbedding):
            yield name, [module.format.name, str(module.dtype)]
