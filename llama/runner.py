"""Runs a step: packs it into tensors, lets a program compute it, returns the logits that somebody wants.

Under `torchrun` rank 0 sends the packed step to the other ranks as one list of integers; they only run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import Protocol

import torch

from llama.attention import StepCache, choose_backend, rows_alone
from llama.cache import KVCache, Span
from llama.device import free_memory, num_sharing, return_memory
from llama.lora import Adapters, Run
from llama.model import Transformer
from llama.parallel import Signal
from llama.scheduler import Step

BLOCK_SIZE = 16  # tokens in a block of the cache
LONG_STEP = 256  # tokens: the temporaries of such a step are worth giving back to the system
MEMORY_SHARE = 0.5  # of the memory that is free after loading, for keys and values


class Program(Protocol):
    """What computes a packed step: the eager `Transformer`, or the same made ahead of time."""

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: StepCache,
        wanted: torch.Tensor | None,
        limits: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens and positions (num_tokens,) int64; each layer stores the step's keys and values in its cache.

        limits (num_tokens,) int64: how many tokens each token's request may reach, where rope scaling depends on it.
        Returns the logits (rows, vocab_size) float32 of the rows `wanted` (rows,) int64, None for all, and the
        normalised states (num_tokens, dim) of all.
        """


@dataclass(frozen=True)
class Pack:
    """A packed step: all requests' tokens in one row, and where each request's stand."""

    tokens: list[int]
    wanted: list[int]  # the rows whose logits are wanted
    copies: list[tuple[int, int]]  # (source, target) blocks, copied before anything else happens
    spans: list[Span]
    runs: list[Run] = field(default_factory=list)  # whose rows are whose, where an adapter is named
    dropped: list[int] = field(default_factory=list)  # adapters that nobody names any more
    wants_states: bool = True  # whether somebody pools them

    @classmethod
    def of(cls, step: Step, num_logits: Sequence[int], block_size: int, wants_states: bool = True) -> Pack:
        """`num_logits[i]`: of how many rows, counted from its end, slice i wants logits."""
        tokens: list[int] = []
        wanted: list[int] = []
        spans = []
        for part, count in zip(step.slices, num_logits, strict=True):
            extents = tuple((b * block_size, n * block_size) for b, n in part.request.extents)
            spans.append(Span(len(tokens), part.count, part.stop, extents, part.request.max_total_tokens))
            tokens += part.tokens
            wanted += range(len(tokens) - count, len(tokens))
        runs = []
        if any(part.request.group for part in step.slices):
            for group, parts in groupby(step.slices, lambda part: part.request.group):
                runs.append((group, sum(part.count for part in parts)))
        return cls(tokens, wanted, list(step.copies), spans, runs, wants_states=wants_states)

    def to_ints(self) -> list[int]:
        spans = (
            (span.num_rows, span.context, span.limit, len(span.extents), *chain.from_iterable(span.extents))
            for span in self.spans
        )
        parts = (self.tokens, self.wanted, self.copies, self.spans, self.runs, self.dropped)
        pairs = chain(*self.copies), chain.from_iterable(spans), chain(*self.runs)
        return [self.wants_states, *map(len, parts), *self.tokens, *self.wanted, *chain(*pairs), *self.dropped]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Pack:
        numbers = iter(ints)

        def take(count: int) -> list[int]:
            return [next(numbers) for _ in range(count)]

        wants_states, num_tokens, num_wanted, num_copies, num_spans, num_runs, num_dropped = take(7)
        tokens, wanted = take(num_tokens), take(num_wanted)
        copies = [tuple(take(2)) for _ in range(num_copies)]
        spans, first_row = [], 0
        for _ in range(num_spans):
            num_rows, context, limit, num_extents = take(4)
            extents = tuple(tuple(take(2)) for _ in range(num_extents))
            spans.append(Span(first_row, num_rows, context, extents, limit))
            first_row += num_rows
        runs = [tuple(take(2)) for _ in range(num_runs)]
        return cls(tokens, wanted, copies, spans, runs, take(num_dropped), bool(wants_states))


@dataclass(frozen=True)
class Output:
    """What a step computed."""

    logits: torch.Tensor  # (wanted rows, vocab_size) float32
    states: torch.Tensor  # (num_tokens, dim): the normalised states of all rows; (num_tokens, 0) if they stayed away


def pick(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows of x (num_rows, ...): x itself where they are all, in order, as in decoding; else a copy."""
    return x if rows == list(range(x.shape[0])) else x[rows]


class Runner:
    """A program and the pool of `num_blocks` blocks in which it keeps every request's keys and values, in `dtype`."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        adapters: Adapters | None = None,
        program: Program | None = None,
    ):
        """`program`: what computes steps in the model's place; where an adapter is named the model itself does."""
        self.model = model
        self.program = program or model
        self.parallel = model.parallel
        self.vocab_size = model.vocab_size
        self.block_size = block_size
        self.device = model.norm.weight.device
        self.cache = KVCache(model.cache_shape, num_blocks * block_size, self.device, dtype)
        self.scaling = model.params.rope_scaling
        self.adapters = adapters or Adapters({})
        self.plan = choose_backend(self.cache, model.norm.weight.dtype, model.fixed_rows, model.params.group)
        self.rows_alone = rows_alone(self.device, model.norm.weight.dtype)

    def salt(self, limit: int) -> bytes:
        """Requests that may reach `limit` tokens share keys only where this is equal."""
        return b"" if self.scaling is None else self.scaling.salt(limit)

    @torch.inference_mode()
    def run(self, pack: Pack) -> Output:
        """The step's states and the logits that are wanted, both in the order of its slices.

        Every rank runs it; rank 0 sends it to the others first. Where there are stages rank 0 alone gets all of it.
        """
        if self.parallel.leads:
            pack = replace(pack, dropped=self.adapters.take_dropped())
            self.parallel.send(Signal.STEP, pack.to_ints())
        elif self.parallel.rank:
            for number in pack.dropped:
                self.adapters.drop(number)
        for source, target in pack.copies:
            self.cache.copy(source * self.block_size, target * self.block_size, self.block_size)
        tokens = torch.tensor(pack.tokens, device=self.device)
        places = [range(span.context - span.num_rows, span.context) for span in pack.spans]
        positions = torch.tensor(list(chain.from_iterable(places)), device=self.device)
        wanted = None
        if pack.wanted != list(range(len(pack.tokens))):  # all, as in decoding, need no copy
            wanted = torch.tensor(pack.wanted, dtype=torch.int64, device=self.device)
        caches = StepCache.of(self.cache, pack.spans, self.plan)
        limits = None
        if self.scaling is not None and self.scaling.by_limit:
            limits = [span.limit for span in pack.spans for _ in range(span.num_rows)]
            limits = torch.tensor(limits, device=self.device)
        program: Program = self.model if pack.runs else self.program
        with self.adapters.running(pack.runs, pack.wanted) if pack.runs else nullcontext():
            output = Output(*program.step(tokens, positions, caches, wanted, limits))
        if self.model.stage.count > 1:
            output = self._brought_back(output, pack)
        if len(pack.tokens) >= LONG_STEP and self.device.type == "cpu":
            return_memory()
        return output

    def _brought_back(self, output: Output, pack: Pack) -> Output:
        """What the last stage computed, on rank 0, from the rank of that stage that sends to it."""
        stage, dim = self.model.stage, self.model.params.dim if pack.wants_states else 0
        if stage.is_last and self.model.tensor.rank == 0:
            stage.send(output.logits)
            stage.send(output.states[:, :dim])
        elif self.parallel.rank == 0:
            logits = stage.receive(len(pack.wanted), self.vocab_size, like=output.logits)
            states = stage.receive(len(pack.tokens), dim, like=output.states)
            return Output(logits, states)
        return output


def count_blocks(model: Transformer, kv_cache_memory: int | None, dtype: torch.dtype, beside: int = 0) -> int:
    """How many cache blocks fit into the memory; no more than max_batch_size sequences could ever use.

    `beside`: bytes that somebody else keeps of each token.
    """
    args = model.params
    block_bytes = BLOCK_SIZE * (model.cache_shape.bytes_per_token(dtype) + beside)
    memory = kv_cache_memory
    if memory is None:
        memory = int(MEMORY_SHARE * free_memory(model.norm.weight.device)) // num_sharing(model.norm.weight.device)
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
