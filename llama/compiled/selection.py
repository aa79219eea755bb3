"""Which program computes a model's steps: the model itself, or a package."""

from __future__ import annotations

import torch

from llama.model import Transformer
from llama.streams import tell

from .cache import PackageCache
from .captured import CapturedStep, why_not_captured
from .exported import ELSE, UNTRUSTED, Exported
from .fingerprint import Fingerprint
from .graph import StepGraph, why_not
from .manifest import PACKAGE
from .program import CompiledStep


def choose_program(
    model: Transformer,
    kv_dtype: torch.dtype,
    compile: bool | None,
    exported: Exported | None = None,
    trust_compiled: bool = False,
) -> CompiledStep | CapturedStep | None:
    """The program for a loaded model whose cache is of `kv_dtype`; None where the model computes by itself.

    On a GPU decoding steps are captured as graphs. Elsewhere it is a package: compile True makes one if it is not in
    the person's cache, None takes one that is there, and for an exported model wants it. False goes without either. The
    package in an exported directory runs with `trust_compiled` alone. Raises ValueError or RuntimeError, in one line.
    """
    if compile is False:
        return None
    is_captured = model.norm.weight.device.type == "cuda" and exported is None
    reason = why_not_captured(model) if is_captured else why_not(model)
    if reason is not None:
        if compile or exported:
            raise ValueError(f"this model does not run compiled: {reason}; leave compile out, or set it to False")
        return None
    if is_captured:
        return CapturedStep(model)
    cache = PackageCache()
    if not (compile or exported or cache.folder.is_dir()):
        return None
    graph = StepGraph(model, kv_dtype)
    here = Fingerprint.of(graph)
    try:
        folder = cache.find(here)
    except ValueError as error:
        if compile:
            raise
        tell(f"warning: {error}")
        folder = None
    if folder is None and compile:
        folder = cache.make(graph, here)
    if folder is None and exported is not None:
        if not trust_compiled:
            raise ValueError(f"{exported.path}: {UNTRUSTED}; {ELSE}")
        folder = exported.trusted_package(here)
    return None if folder is None else CompiledStep(graph, folder / PACKAGE)
