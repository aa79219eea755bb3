"""From a graph to a package: torch.export and AOTInductor, which call the system's C++ compiler."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.kernels.attention import row_table
from llama.linear import Linear

from .graph import StepGraph, tensors_of

GRAPH_ROWS = 512  # of a step; the scheduler makes none that is longer
EXAMPLE_ROWS = 4  # any number but 0 and 1, which tracing takes for constants
EXAMPLE_SLOTS = 48
COMPILERS = ("g++", "c++", "clang++")
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,  # the loaded model's weights are given to it
    "aot_inductor.precompile_headers": False,  # used once, they cost more than they save, and lie in /tmp
    # what the compiler's own loops do between operators is little, and a region of threads costs more; so a package
    # does not depend on how many threads there are
    "cpp.threads": 1,
}


def compile_package(graph: StepGraph, path: Path) -> None:
    """Writes the graph's package to `path`, in a minute or so. Raises RuntimeError, in one line, where that fails."""
    validate_compiler()
    from torch._inductor import aoti_compile_and_package  # takes seconds to import
    from torch._inductor.utils import fresh_cache  # a private folder, and not one in /tmp that others know
    from torch.export import export

    example = example_inputs(graph)
    try:
        with torch.no_grad(), traceable(graph), fresh_cache(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = export(graph, example, dynamic_shapes=dynamic_shapes(example), strict=False)
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)
    except Exception as error:  # of three compilers, one below the other
        first = next(iter(str(error).strip().splitlines()), "")
        raise RuntimeError(f"the model's step does not compile: {type(error).__name__}: {first}") from error


def validate_compiler() -> None:
    """Raises RuntimeError, in one line, where there is no C++ compiler."""
    asked = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([asked] if asked else COMPILERS)):
        missing = f"CXX names {asked}, which is not there" if asked else "there is no C++ compiler"
        raise RuntimeError(f"compiling a model needs g++, and {missing}: install it, or leave compile out")


def example_inputs(graph: StepGraph) -> tuple[Any, ...]:
    """Inputs of a small step; tracing looks at their shapes and types alone."""

    def rows(first: int = 0) -> Tensor:
        return torch.arange(first, EXAMPLE_ROWS)

    table = row_table((row, [(0, row + 1)]) for row in range(EXAMPLE_ROWS))
    cache = KVCache(graph.model.cache_shape, EXAMPLE_SLOTS, torch.device("cpu"), graph.kv_dtype)
    limits = [rows()] if graph.by_limit else []
    return rows(), rows(), rows(1), rows(), table, limits, tensors_of(cache.layers)


def dynamic_shapes(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """What may have another size in every step, for each of the inputs."""
    from torch.export import Dim

    rows, wanted = {0: Dim("rows", min=1, max=GRAPH_ROWS)}, {0: Dim("wanted", min=1, max=GRAPH_ROWS)}
    table, slots = {0: Dim("table", min=4)}, {1: Dim("slots", min=1)}
    *_, limits, stores = example
    return rows, rows, wanted, rows, table, [rows] * len(limits), [slots] * len(stores)


@contextmanager
def traceable(graph: StepGraph) -> Iterator[None]:
    """Meanwhile ordinary tensors stand in the places of oneDNN's opaque ones: tracing looks at shapes alone."""
    blocked = {linear: linear.blocked for linear in graph.modules() if isinstance(linear, Linear)}
    blocked = {linear: weight for linear, weight in blocked.items() if weight is not None}
    for linear, weight in blocked.items():
        linear.blocked = torch.empty(weight.shape, dtype=weight.dtype)
    try:
        yield
    finally:
        for linear, weight in blocked.items():
            linear.blocked = weight
