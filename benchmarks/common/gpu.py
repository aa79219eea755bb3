"""A GPU's own time, and what no program can beat on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def gpu_seconds(work: Callable[[], object], times: int = 20) -> float:
    """Of one call, on the GPU, when `times` of them follow each other in a graph, as in a model's steps."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / times


def limits() -> dict[str, Callable[[], float]]:
    """The card's own: bytes a second that are read and written, operations a second in bfloat16."""
    buffer = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(buffer)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return {
        "bandwidth": lambda: 2 * buffer.nbytes / gpu_seconds(lambda: target.copy_(buffer)),
        "rate": lambda: 2 * 8192**3 / gpu_seconds(lambda: F.linear(square, square)),
    }
