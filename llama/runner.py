"""Runs a step: packs it into tensors, lets the model compute it, returns the logits that somebody wants.

Under `torchrun` rank 0 broadcasts the packed step as one list of integers, and the other ranks do nothing but
run what they receive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from llama.cache import KVCache, Span
from llama.device import free_memory, return_memory
from llama.model import Transformer
from llama.scheduler import Step

BLOCK_SIZE = 16  # tokens in a block of the cache
LONG_STEP = 256  # tokens: the temporaries of such a step are worth giving back to the system
MEMORY_SHARE = 0.5  # of the memory that is free after loading, for keys and values


@dataclass(frozen=True)
class Batch:
    """A packed step: all requests' tokens in one row, and where each request's stand."""

    tokens: list[int]
    wanted: list[int]  # the rows whose logits are wanted
    copies: list[tuple[int, int]]  # (source, target) blocks, copied before anything else happens
    spans: list[Span]

    @classmethod
    def pack(cls, step: Step, num_logits: Sequence[int], block_size: int) -> Batch:
        """`num_logits[i]`: of how many rows, counted from its end, slice i wants logits."""
        tokens: list[int] = []
        wanted: list[int] = []
        spans = []
        for piece, count in zip(step.slices, num_logits, strict=True):
            stop = piece.start + piece.count
            extents = tuple((b * block_size, n * block_size) for b, n in piece.request.extents)
            spans.append(Span(len(tokens), piece.count, stop, extents))
            tokens += piece.request.tokens[piece.start : stop]
            wanted += range(len(tokens) - count, len(tokens))
        return cls(tokens, wanted, list(step.copies), spans)

    def to_ints(self) -> list[int]:
        spans = (
            (span.num_rows, span.context, len(span.extents), *chain.from_iterable(span.extents))
            for span in self.spans
        )
        lengths = (len(self.tokens), len(self.wanted), len(self.copies), len(self.spans))
        return [*lengths, *self.tokens, *self.wanted, *chain(*self.copies), *chain.from_iterable(spans)]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Batch:
        numbers = iter(ints)

        def take(count: int) -> list[int]:
            return [next(numbers) for _ in range(count)]

        num_tokens, num_wanted, num_copies, num_spans = take(4)
        tokens, wanted = take(num_tokens), take(num_wanted)
        copies = [tuple(take(2)) for _ in range(num_copies)]
        spans, first_row = [], 0
        for _ in range(num_spans):
            num_rows, context, num_extents = take(3)
            extents = tuple(tuple(take(2)) for _ in range(num_extents))
            spans.append(Span(first_row, num_rows, context, extents))
            first_row += num_rows
        return cls(tokens, wanted, copies, spans)


@dataclass(frozen=True)
class Output:
    """What a step computed."""

    logits: torch.Tensor  # (wanted rows, vocab_size) float32
    states: torch.Tensor  # (num_tokens, dim): the normalised states of all rows


def pick(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows of x (num_rows, ...): x itself where they are all, in order, as in decoding; else a copy."""
    return x if rows == list(range(len(x))) else x[rows]


class Runner:
    """A model and the pool of `num_blocks` blocks in which it keeps every request's keys and values, in `dtype`."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int, dtype: torch.dtype):
        self.model = model
        self.block_size = block_size
        self.device = model.norm.weight.device
        self.cache = KVCache(
            model.cache_shape, num_blocks * block_size, self.device, dtype, fixed_rows=model.fixed_rows
        )

    def run(self, step: Step, num_logits: Sequence[int]) -> Output:
        """The step's states and the logits that are wanted, both in the order of its slices."""
        batch = Batch.pack(step, num_logits, self.block_size)
        if self.model.parallel.size > 1:
            self.model.parallel.broadcast_ints(batch.to_ints())
        return self._forward(batch)

    def follow(self) -> None:
        """On every rank but 0: runs what rank 0 runs, until it says `release`."""
        while ints := self.model.parallel.broadcast_ints():
            self._forward(Batch.from_ints(ints))

    def release(self) -> None:
        """On rank 0: lets the others return from `follow`."""
        self.model.parallel.broadcast_ints([])

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> Output:
        for source, target in batch.copies:
            self.cache.copy(source * self.block_size, target * self.block_size, self.block_size)
        tokens = torch.tensor(batch.tokens, device=self.device)
        places = [range(span.context - span.num_rows, span.context) for span in batch.spans]
        positions = torch.tensor(list(chain.from_iterable(places)), device=self.device)
        states = self.model.hidden_states(tokens, positions, self.cache.layers(batch.spans))
        output = Output(self.model.logits(pick(states, batch.wanted)), states)
        if len(batch.tokens) >= LONG_STEP and self.device.type == "cpu":
            return_memory()
        return output


def count_blocks(model: Transformer, kv_cache_memory: int | None, dtype: torch.dtype) -> int:
    """How many cache blocks fit into the memory; no more than max_batch_size sequences could ever use."""
    args = model.params
    block_bytes = BLOCK_SIZE * model.cache_shape.bytes_per_token(dtype)
    memory = kv_cache_memory
    if memory is None:
        memory = int(MEMORY_SHARE * free_memory(model.norm.weight.device))
    for_one = -(-args.max_seq_len // BLOCK_SIZE)
    num_blocks = min(memory // block_bytes, for_one * args.max_batch_size)
    if num_blocks < for_one:
        longest = num_blocks * BLOCK_SIZE
        raise ValueError(
            f"one sequence of max_seq_len {args.max_seq_len} needs {for_one * block_bytes / 2**20:.2f} MiB for keys "
            f"and values, but {memory / 2**20:.2f} MiB are there: set max_seq_len to {longest} or less, "
            "or give more kv_cache_memory"
        )
    return num_blocks
