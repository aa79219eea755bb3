"""Model parallelism on fairscale: who takes part, and the collectives.

One process is the ordinary case: then there is no process group and every collective is the identity. Under
`torchrun` the ranks of one model form a group; fairscale is imported only then. NCCL carries CUDA tensors, gloo
carries everything on the CPU.
"""

from __future__ import annotations

import enum
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

IDLE_TIMEOUT = timedelta(days=3650)  # waiting for the next request is not a failure
STEP_CAPACITY = 4096  # integers that travel in a step's first broadcast; longer steps need a second one


class Signal(enum.IntEnum):
    """What rank 0 tells the others while it leads; the first integer of a message."""

    STEP = 0  # run this
    ITEMS = 1  # what came of the steps before, as JSON
    END = 2  # there is no more; also where rank 0's caller left early
    ERROR = 3  # rank 0 raised: its text, and whether it was a ValueError, as JSON
    BEAT = 4  # nothing to do: meet rank 0, which so finds out that everybody is there
    CALL = 5  # call this of the model: a method's name and its arguments, as JSON


class Item(Protocol):
    """What travels from rank 0 to the others: a dataclass that JSON can hold."""

    def to_json(self) -> Any: ...

    @classmethod
    def from_json(cls, value: Any) -> Item: ...


T = TypeVar("T", bound=Item)


@dataclass(frozen=True)
class ModelParallel:
    """One rank's place among the `size` ranks that hold a model together."""

    rank: int = 0
    size: int = 1
    root: int = 0  # rank 0 of this model, counted over all processes
    control: Any = None  # the group that carries steps and results; it never times out

    @property
    def leads(self) -> bool:
        """Whether there are others, who do what this rank says."""
        return self.rank == 0 and self.size > 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`; with several ranks `x` itself is overwritten."""
        if self.size == 1:
            return x
        from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

        return reduce_from_model_parallel_region(x)

    def all_gather(self, x: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """Every rank's `x` (..., n), joined along the last dimension: (..., n * size).

        With `length` these are all ranks' parts of that many, as `share` makes them: (..., length).
        """
        if self.size == 1:
            return x
        from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region

        if length is None or length % self.size == 0:
            return gather_from_model_parallel_region(x.contiguous())
        filled = F.pad(x, (0, share_size(length, self.size) - x.shape[-1]))
        return gather_from_model_parallel_region(filled)[..., :length].contiguous()

    def broadcast_ints(self, values: list[int] | None = None) -> list[int]:
        """Rank 0's integers, on every rank. One broadcast carries up to `STEP_CAPACITY` of them."""
        message = torch.zeros(STEP_CAPACITY, dtype=torch.int64)
        if self.rank == 0:
            body = torch.tensor([len(values), *values], dtype=torch.int64)
            head, rest = body[:STEP_CAPACITY], body[STEP_CAPACITY:]
            message[: len(head)] = head
        self._broadcast(message)
        length = int(message[0]) + 1
        if length > STEP_CAPACITY:
            if self.rank != 0:
                rest = torch.empty(length - STEP_CAPACITY, dtype=torch.int64)
            self._broadcast(rest)
            message = torch.cat((message, rest))
        return message[1:length].tolist()

    def _broadcast(self, message: torch.Tensor) -> None:
        """Fills `message` with rank 0's, and waits until gloo's own thread has let go of it.

        That thread needs the interpreter to do so; one that ends in the meantime, after a last answer, aborts.
        """
        dist.broadcast(message, self.root, group=self.control)
        while message._use_count() > 1:
            time.sleep(0)

    def broadcast_json(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank, as JSON."""
        if self.size == 1:
            return value
        return from_ints(self.broadcast_ints(to_ints(value)))

    def send(self, signal: Signal, body: list[int]) -> None:
        """On rank 0: tells the others, who `receive`."""
        self.broadcast_ints([signal, *body])

    def receive(self) -> tuple[Signal, list[int]]:
        """On the other ranks: what rank 0 sent."""
        signal, *body = self.broadcast_ints()
        return Signal(signal), body

    def count(self, is_so: bool) -> int:
        """On how many ranks something is so. Every rank takes part."""
        if self.size == 1:
            return int(is_so)
        number = torch.tensor([int(is_so)])
        dist.all_reduce(number, group=self.control)
        return int(number)

    def beat(self) -> None:
        """On rank 0, between steps: waits until every other rank is there. Raises RuntimeError where one is gone."""
        self.send(Signal.BEAT, [])
        self._meet()

    def _meet(self) -> None:
        dist.barrier(group=self.control)

    def follow(
        self, run_step: Callable[[list[int]], object], call: Callable[..., object], heard: Callable[[], object]
    ) -> None:
        """On the other ranks: takes part in whatever rank 0 does, until it sends END; `heard` is called each time."""
        signal, body = self.receive()
        while signal is not Signal.END:
            heard()
            if signal is Signal.STEP:
                run_step(body)
            elif signal is Signal.CALL:
                call(*from_ints(body))
            elif signal is Signal.BEAT:
                self._meet()
            elif signal is Signal.ERROR:
                raise RuntimeError(from_ints(body)[0])
            signal, body = self.receive()

    def lead(
        self, rounds: Iterator[list[T]], run_step: Callable[[list[int]], object], kind: type[T]
    ) -> Iterator[list[T]]:
        """What rank 0's `rounds` yields, on every rank as it comes.

        The other ranks never touch their own `rounds`: they `run_step` what rank 0 sends on the way. An error of rank
        0 is raised everywhere. A rank that leaves early stops the work if it is rank 0; another one goes on helping.
        `kind` is the items' class.
        """
        if self.size == 1:
            return rounds
        return self._lead(rounds) if self.rank == 0 else self._follow(run_step, kind)

    def _lead(self, rounds: Iterator[list[T]]) -> Iterator[list[T]]:
        try:
            for items in rounds:
                self.send(Signal.ITEMS, to_ints([item.to_json() for item in items]))
                yield items
        except GeneratorExit:
            self.send(Signal.END, [])
            raise
        except BaseException as error:
            self.send(Signal.ERROR, to_ints([str(error), isinstance(error, ValueError)]))
            raise
        self.send(Signal.END, [])

    def _follow(self, run_step: Callable[[list[int]], object], kind: type[T]) -> Iterator[list[T]]:
        is_wanted = True
        while True:
            signal, body = self.receive()
            if signal is Signal.STEP:
                run_step(body)
            elif signal is Signal.END:
                return
            elif signal is Signal.ERROR and is_wanted:
                text, is_value_error = from_ints(body)
                raise (ValueError if is_value_error else RuntimeError)(text)
            elif signal is Signal.ERROR:
                return
            elif is_wanted:
                try:
                    yield [kind.from_json(item) for item in from_ints(body)]
                except GeneratorExit:  # rank 0's steps need every rank until their end
                    is_wanted = False


def to_ints(value: Any) -> list[int]:
    """A value as JSON, a byte an integer."""
    return list(json.dumps(value).encode())


def from_ints(ints: list[int]) -> Any:
    """The inverse of `to_ints`: nothing that is received can run."""
    return json.loads(bytes(ints))


def share_size(length: int, size: int) -> int:
    """How many of `length` rows each of `size` ranks has; the last one may have fewer."""
    return -(-length // size)


def share(length: int, rank: int, size: int) -> tuple[int, int]:
    """Where a rank's part of `length` rows starts and stops."""
    start = min(rank * share_size(length, size), length)
    return start, min(start + share_size(length, size), length)


SINGLE = ModelParallel()
_joined: dict[int, tuple[Any, ModelParallel]] = {}  # by size, with the world that it is of: models share its groups


def num_launched() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(model_parallel_size: int | None = None, device: str | None = None) -> ModelParallel:
    """Joins the ranks that `torchrun` started into models of `model_parallel_size` ranks (all, if None).

    With one process nothing is initialised; a second model shares the first one's groups. A process group or a
    model-parallel group that the host program made is used as it is. Raises ValueError where the sizes do not fit.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else num_launched()
    size = model_parallel_size or world_size
    if size > world_size or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, but {world_size} process(es) run: it must divide their number; "
            f"start with torchrun --nproc_per_node {size}"
        )
    if size == 1:
        return SINGLE
    if dist.is_initialized() and size in _joined and _joined[size][0] is dist.group.WORLD:
        return _joined[size][1]
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend)
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized():
        initialize.initialize_model_parallel(size)
    if initialize.get_model_parallel_world_size() != size:
        raise ValueError(
            f"model_parallel_size is {size}, but this program initialised fairscale with "
            f"{initialize.get_model_parallel_world_size()}: use that size"
        )
    control = None
    for first in range(0, world_size, size):  # every process takes part in making every group
        group = dist.new_group(list(range(first, first + size)), timeout=IDLE_TIMEOUT, backend="gloo")
        if first <= dist.get_rank() < first + size:
            control = group
    rank = initialize.get_model_parallel_rank()
    joined = ModelParallel(rank, size, dist.get_rank() - rank, control)
    _joined[size] = dist.group.WORLD, joined
    return joined
