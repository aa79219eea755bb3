"""The compiled kernels, if they are there: one shared library, built by setup.py from `csrc/`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch


def load_library() -> Path | None:
    """Load the compiled kernels that stand beside this file; None where none were built or they do not fit."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            torch.ops.load_library(path)
            return path
        except OSError as error:
            warnings.warn(f"{path.name} does not load, PyTorch operators do its work: {error}", stacklevel=2)
    return None


PATH = load_library()
AVAILABLE = PATH is not None
UNIT = 16  # numbers that the kernels for attention and between products take at a time


def operator(name: str) -> Callable[..., Any] | None:
    """torch.ops.llama's operator of that name, found once: looking it up takes as long as a small product.

    None where nothing was compiled, or what was is older than this operator.
    """
    packet = getattr(torch.ops.llama, name, None) if AVAILABLE else None
    return None if packet is None else packet.default


def serves(x: torch.Tensor, multiple: int = UNIT) -> bool:
    """Whether those kernels take x: on the CPU, in their types, its last dimension a multiple."""
    return AVAILABLE and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] % multiple == 0


def formats() -> frozenset[str]:
    """The low-bit formats that have compiled kernels; for the others PyTorch's operators do."""
    return _compiled_formats() if AVAILABLE else frozenset()


@cache  # strings that an operator returns are never given back by torch
def _compiled_formats() -> frozenset[str]:
    return frozenset(torch.ops.llama.formats())


def instruction_sets() -> list[str]:
    """What this processor runs of what the kernels are written for, best first; empty where nothing was compiled."""
    if not AVAILABLE:
        return []
    bits = torch.ops.llama.instruction_sets()
    return [name for bit, name in ((1, "avx512_vnni"), (2, "avx2")) if bits & bit] + ["scalar"]
