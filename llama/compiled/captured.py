"""Steps on a GPU as CUDA graphs: what Python and the driver would say of each launch is said once.

A decoding step is some hundred launches, of which many take the GPU less time than they take to be asked for. A graph
of them is asked for at once (`torch.cuda.CUDAGraph`); what it reads and writes stays where it was when captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.attention import Paged, StepCache
from llama.cache import Store
from llama.kernels.cuda import has_triton
from llama.linear import Counted
from llama.model import Transformer

Replay = Callable[[], tuple[Tensor, Tensor]]  # -> logits and states
SHORTEST = 512  # tokens: the least that a graph is captured for
LONGER = 4  # how many times longer the contexts of the next one are


@dataclass(frozen=True)
class Captured:
    """One graph, for up to so many rows of contexts up to some length; rows that a step lacks are none (slot -1)."""

    replay: Replay
    tokens: Tensor
    positions: Tensor
    backend: Paged

    def step(self, tokens: Tensor, positions: Tensor, backend: Paged) -> tuple[Tensor, Tensor]:
        """What comes back is overwritten by the next replay of any graph."""
        num_rows, surplus = len(tokens), len(self.tokens) - len(tokens)
        fill_rows(self.tokens, tokens, surplus)
        fill_rows(self.positions, positions, surplus)
        fill_rows(self.backend.slots, backend.slots, surplus, -1)
        fill_rows(self.backend.short.tiles, backend.short.tiles, surplus)
        self.backend.runs[:num_rows, : backend.runs.shape[1]].copy_(backend.runs)
        logits, states = self.replay()
        return logits[:num_rows], states[:num_rows]


class CapturedStep:
    """A `Program`: decoding steps on a GPU as graphs, captured when first wanted; others are the model's own.

    A decoding step has one row of each request. Graphs are of some numbers of rows and lengths of contexts, and gone
    when a weight is replaced, or where the cache is another one.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._graphs: dict[tuple[int, int], Captured] = {}
        self._pool: object | None = None  # of memory that all graphs share: one runs at a time
        self._num_set: int | None = None  # what `Counted` said when they were captured
        self._layers: Sequence[tuple[Store, Store]] | None = None  # of the cache that they write to

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        caches: StepCache,
        wanted: Tensor | None,
        limits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Program`."""
        backend = caches.backend
        is_decoding = isinstance(backend, Paged) and backend.is_decoding and wanted is None and limits is None
        if not is_decoding or self.model.stack.is_hooked:
            return self.model.step(tokens, positions, caches, wanted, limits)
        if self._num_set != Counted.num_set or self._layers is not caches.layers:
            self._graphs.clear()
            self._num_set, self._layers = Counted.num_set, caches.layers
        size = rows_of_graph(len(tokens)), context_of_graph(backend.short.longest)
        if size not in self._graphs:
            self._graphs[size] = self._capture(*size, backend, positions.device)
        return self._graphs[size].step(tokens, positions, backend)

    def _capture(self, num_rows: int, longest: int, like: Paged, device: torch.device) -> Captured:
        tokens, positions, slots = torch.zeros((3, num_rows), dtype=torch.int64, device=device).unbind()
        backend = like.for_decoding(slots.fill_(-1), longest)
        step = partial(self.model.step, tokens, positions, StepCache(backend, self._layers), None)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return Captured(capture(step, device, self._pool), tokens, positions, backend)


def capture(step: Callable[[], tuple[Tensor, Tensor]], device: torch.device, pool: object) -> Replay:
    """What launches all that `step` launches, and returns what it returned: the same tensors, filled anew."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # what libraries and we make once is made outside of the graph
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        results = step()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


def fill_rows(target: Tensor, rows: Tensor, surplus: int, value: int = 0) -> None:
    """Copies rows into `target`, and `value` into the rows behind them."""
    if surplus:
        rows = F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, surplus), value=value)
    target.copy_(rows)


def rows_of_graph(num_rows: int) -> int:
    """How many rows the graph has that serves so many: 1, 2, 4, 8, 16, 24, 32 ... 64, 96, 128 ..."""
    if num_rows <= 8:
        return 1 << (num_rows - 1).bit_length()
    step = 8 if num_rows <= 64 else 32
    return -(-num_rows // step) * step


def context_of_graph(longest: int) -> int:
    """The longest context of the graph that serves contexts of so many tokens."""
    context = SHORTEST
    while context < longest:
        context *= LONGER
    return context


def why_not_captured(model: Transformer) -> str | None:
    """What keeps a model's steps from being captured, in the words of the options that it was built with."""
    if model.parallel.size > 1:
        return f"graphs are of one process, and {model.parallel.size} ranks share this model"
    if model.fixed_rows is not None:
        return "deterministic=True attends in tiles that depend on each position, which a graph cannot"
    if not has_triton():
        return "graphs call kernels in Triton, which is not installed"
    return None
