"""The ranks that hold one model: rank 0 says what is done, the others do it.

One process is the ordinary case: then there is no process group. Under `torchrun` the ranks of one model form one.
"""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .heartbeat import Heartbeat
from .stage import Stage
from .tensor import TensorParallel

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
    """One rank's place among the `size` ranks that hold a model together, in `num_stages` stages of as many ranks."""

    rank: int = 0
    size: int = 1
    root: int = 0  # rank 0 of this model, counted over all processes
    control: Any = None  # the group that carries steps and results; it never times out
    num_stages: int = 1
    heartbeat: Heartbeat | None = None  # by which all ranks know that the others' machines are there

    @property
    def tensor(self) -> TensorParallel:
        """Its place among the ranks of its stage."""
        size = self.size // self.num_stages
        return TensorParallel(self.rank % size, size)

    @property
    def stage(self) -> Stage:
        """Its place among the stages."""
        size = self.size // self.num_stages
        before, after = (self.root + (self.rank + step) % self.size for step in (-size, size))
        return Stage(self.rank // size, self.num_stages, before, after)

    @property
    def leads(self) -> bool:
        """Whether there are others, who do what this rank says."""
        return self.rank == 0 and self.size > 1

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

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank."""
        if self.size == 1:
            return [value]
        body = torch.tensor(to_ints(value), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(body)]), group=self.control)
        longest = int(max(lengths))
        bodies = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(bodies, F.pad(body, (0, longest - len(body))), group=self.control)
        return [from_ints(one[: int(length)].tolist()) for one, length in zip(bodies, lengths, strict=True)]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Around what each rank does by itself: where one fails, the others raise what it said, as ValueError or else
        RuntimeError. Without it they would wait for that rank in their next collective.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        told = self.gather_json(failed and [str(failed), isinstance(failed, ValueError | OSError)])
        if failed is not None:
            raise failed
        for rank, (text, is_given_wrong) in ((rank, one) for rank, one in enumerate(told) if one is not None):
            raise (ValueError if is_given_wrong else RuntimeError)(f"rank {rank}: {text}")

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


SINGLE = ModelParallel()
