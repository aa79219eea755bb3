"""A package that runs: what its graph does not know is left to the eager model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.attention import CompiledRows, StepCache

from .compiler import GRAPH_ROWS
from .graph import StepGraph, tensors_of


class CompiledStep:
    """A `Program` of a package over the weights of a loaded model, which it shares with the eager one.

    Steps that attend by tiles too (long spans), that are longer than the graph's or want no logits are the model's own.
    """

    def __init__(self, graph: StepGraph, package: Path):
        self.model = graph.model
        self.package = package
        self.kv_dtype = graph.kv_dtype
        self.by_limit = graph.by_limit
        self._loader = load_package(package)
        weights = graph.weights()
        named = {name: weights[name] for name in self._loader.get_constant_fqns()}
        self._loader.load_constants(named, False, True, True)  # in use, all of them, and ours: none is copied
        self._weights = named  # which it does not own

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        caches: StepCache,
        wanted: Tensor | None,
        limits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Program`."""
        backend, num_rows = caches.backend, tokens.shape[0]
        is_short = isinstance(backend, CompiledRows) and not backend.tiles.spans and num_rows <= GRAPH_ROWS
        if not is_short or (wanted is not None and not wanted.shape[0]):
            return self.model.step(tokens, positions, caches, wanted, limits)
        assert caches.layers[0][0].numbers.dtype == self.kv_dtype, "the cache is not of the type that was compiled"
        wanted = torch.arange(num_rows) if wanted is None else wanted
        stored = tensors_of(caches.layers)
        by_limit = (limits,) if self.by_limit else ()
        logits, states = self._loader.boxed_run(
            [tokens, positions, wanted, backend.slots, backend.table, *by_limit, *stored]
        )
        return logits, states


def load_package(path: Path) -> Any:
    """torch's loader of a package; its own function for that imports its compiler, which takes seconds."""
    loader = getattr(torch._C._aoti, "AOTIModelPackageLoader", None)  # may go, or change: it is nobody's promise
    if loader is not None:
        try:
            return loader(str(path), "model", False, 1, -1)
        except TypeError:
            pass
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path)).loader
