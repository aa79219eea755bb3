"""Adapters of low rank beside a model (LoRA): what each adds to a product, and to which rows of a step.

Hu et al. 2021, arXiv:2106.09685. Rows of one adapter lie side by side in a step, so that each is a slice and nothing is
gathered; rows that name none are not touched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from llama.kernels.lowrank import Factors, Group, LowRankRows, add_low_rank_twin
from llama.linear import Counted, in_tiles

MOST_ROWS = 64  # of one adapter in a step that the kernel takes: a matrix library does more of them faster
MOST_PLANS = 64  # that a place keeps: of steps that differ in whose rows they have

Run = tuple[int, int]  # (an adapter's number, 0 for none; how many rows)


class Change(Protocol):
    """What an adapter does to one product, or to the embedding."""

    def apply(self, y: Tensor, x: Tensor) -> None:
        """Changes y (rows, out), in place, that was computed of x (rows, in); x is (rows,) ids for the embedding."""


@dataclass(frozen=True)
class LowRankChange:
    """y + x a b, of each part. The scale is in b."""

    factors: Factors
    fixed_rows: int | None = None  # see `in_tiles`

    def is_for_kernel(self, num_rows: int) -> bool:
        """Whether `LowRankRows` takes so many rows: then it is faster, and a row's bits are its own anyhow."""
        return self.factors.width is not None and (self.fixed_rows is not None or num_rows <= MOST_ROWS)

    def apply(self, y: Tensor, x: Tensor) -> None:
        if self.fixed_rows is None:
            add_low_rank_twin(y, x, self.factors)
        else:
            y.add_(in_tiles(lambda tile: self._alone(tile, y), x, self.fixed_rows))

    def _alone(self, x: Tensor, like: Tensor) -> Tensor:
        y = like.new_zeros(len(x), like.shape[1])
        add_low_rank_twin(y, x, self.factors)
        return y


@dataclass(frozen=True)
class ColumnChange:
    """y * gain + offset: DoRA's, and that of biases."""

    gain: Tensor | None = None  # (out,)
    offset: Tensor | None = None  # (out,)

    def apply(self, y: Tensor, x: Tensor) -> None:
        if self.gain is not None:
            y.mul_(self.gain)
        if self.offset is not None:
            y.add_(self.offset)


@dataclass(frozen=True)
class WholeOutput:
    """An output layer in the place of the model's."""

    weight: Tensor  # (out, in)
    fixed_rows: int | None = None

    def apply(self, y: Tensor, x: Tensor) -> None:
        if self.fixed_rows is None:
            y.copy_(F.linear(x, self.weight))
        else:
            y.copy_(in_tiles(lambda tile: F.linear(tile, self.weight), x, self.fixed_rows))


@dataclass(frozen=True)
class WholeEmbedding:
    """An embedding in the place of the model's; every rank has all of it."""

    table: Tensor  # (vocab_size, dim)

    def apply(self, y: Tensor, x: Tensor) -> None:
        y.copy_(F.embedding(x, self.table))


@dataclass(frozen=True)
class LowRankEmbedding:
    """What is added to the rows that are looked up; every rank has all of it."""

    table: Tensor  # (vocab_size, rank), scaled
    a: Tensor  # (rank, dim)

    def apply(self, y: Tensor, x: Tensor) -> None:
        y.add_((F.embedding(x, self.table).unsqueeze(1) @ self.a).squeeze(1))


class StepRows:
    """Whose the rows of a step are: what all places look at, and the owner sets."""

    def __init__(self) -> None:
        self.runs: tuple[Run, ...] = ()


class Site(Counted):
    """One place of a model where adapters change a result: `changes` by their numbers, `rows` says whose rows they are.

    Steps are alike, so plans of what is to be done are kept. Of an adapter's changes those of low rank are the last.
    """

    def __init__(self) -> None:
        self.rows = StepRows()
        self.always: list[Change] = []  # to every row, before what their own adapters change
        self.changes: dict[int, Sequence[Change]] = {}
        self._plans: dict[tuple[int, tuple[Run, ...]], list[tuple[slice | None, Change]]] = {}

    def __bool__(self) -> bool:
        """Whether it changes anything in this step."""
        return bool(self.always) or any(adapter in self.changes for adapter, _ in self.rows.runs)

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y (num_tokens, out), changed in place."""
        plan = self._plans.get((y.shape[0], self.rows.runs))
        for rows, change in self._planned(y.shape[0]) if plan is None else plan:
            if rows is None:
                change.apply(y, x)
            else:
                change.apply(y[rows], x[rows])
        return y

    def additions(self, num_rows: int) -> list[LowRankRows] | None:
        """What it adds in this step, of so many rows; None where it does anything else."""
        plan = [change for _, change in self._planned(num_rows)]
        return plan if all(isinstance(change, LowRankRows) for change in plan) else None

    def remove(self, number: int) -> None:
        """Lets go of an adapter's changes."""
        self.changes = {other: changes for other, changes in self.changes.items() if other != number}
        self._plans.clear()

    def _planned(self, num_rows: int) -> list[tuple[slice | None, Change]]:
        """What to apply, and to which rows; None for all."""
        parts, first = [], 0
        for adapter, number in self.rows.runs:
            if number and adapter in self.changes:
                parts.append((first, number, self.changes[adapter]))
            first += number
        plan = [*in_one_call([(0, num_rows, self.always)]), *in_one_call(parts)]
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[num_rows, self.rows.runs] = plan
        return plan


def site_at(owner: object, attribute: str) -> Site:
    """The site in that place, or a new one, which is not there yet."""
    site = getattr(owner, attribute)
    return Site() if site is None else site


def in_one_call(parts: Iterable[tuple[int, int, Sequence[Change]]]) -> Iterator[tuple[slice | None, Change]]:
    """Changes of some (first row, rows, changes): those that the kernel takes become one, behind the others."""
    calls: list[list[Group]] = []  # no row twice in one: threads share its work
    for first, num_rows, changes in parts:
        num_calls = 0
        for change in changes:
            if isinstance(change, LowRankChange) and change.is_for_kernel(num_rows):
                calls += [] if num_calls < len(calls) else [[]]
                calls[num_calls].append(Group(first, num_rows, change.factors))
                num_calls += 1
            else:
                yield slice(first, first + num_rows), change
    yield from ((None, LowRankRows(groups)) for groups in calls)


class UnknownAdapter(ValueError):
    """No adapter of that name is loaded."""


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter on its model. `digest` is of its content: keys and values depend on it, and not on its name."""

    name: str
    number: int
    digest: bytes
    num_requests: int = field(default=0, compare=False)
    is_unloaded: bool = False  # and waits for its requests


class Adapters:
    """The adapters of one model, by name; every rank has the same ones under the same numbers.

    `places`: where they may change something, by name: an object and its attribute that is None or a `Site`. Rank 0
    (`leads`) counts requests; where it `tells` other ranks, what it lets go of is in `dropped` until they know.
    """

    OUTPUT = "output"  # the place that sees the rows whose logits are wanted, and no others

    def __init__(self, places: Mapping[str, tuple[Any, str]], leads: bool = True, tells: bool = False):
        self.places = places
        self.leads = leads
        self.tells = tells
        self.dropped: list[int] = []
        self._numbers = count(1)
        self._by_name: dict[str, LoadedAdapter] = {}
        self._held: set[int] = set()  # numbers whose tensors are there
        self._rows = StepRows()
        self._wanted_rows = StepRows()

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def names_of(self, numbers: Iterable[int]) -> list[str]:
        """Those of these that can be named, in order. May be asked from any thread."""
        wanted = set(numbers)
        return sorted(one.name for one in list(self._by_name.values()) if one.number in wanted)

    def validate_new(self, name: str) -> None:
        """Raises ValueError for a name that none can get."""
        if not name or not isinstance(name, str):
            raise ValueError(f"an adapter's name is {name!r}: give a text")
        if name in self._by_name:
            raise ValueError(f"the adapter {name!r} is loaded already: unload it first, or give another name")

    def add(self, name: str, digest: bytes, changes: Mapping[str, Sequence[Change]]) -> None:
        """Puts an adapter beside the model: its changes by place. Raises ValueError for a name that is taken."""
        self.validate_new(name)
        loaded = LoadedAdapter(name, next(self._numbers), digest)
        for place, some in changes.items():
            owner, attribute = self.places[place]
            site = site_at(owner, attribute)
            site.rows = self._wanted_rows if place == self.OUTPUT else self._rows
            site.changes[loaded.number] = some
            setattr(owner, attribute, site)
        self._by_name[name] = loaded
        self._held.add(loaded.number)

    def remove(self, name: str) -> None:
        """Nobody can name it any more; its memory comes back when its last request has ended."""
        loaded = self.find(name)
        del self._by_name[name]
        loaded.is_unloaded = True
        if self.leads and not loaded.num_requests:
            self.drop(loaded.number)

    def find(self, name: str) -> LoadedAdapter:
        """Raises UnknownAdapter, with the names that there are."""
        if name not in self._by_name:
            there = ", ".join(self._by_name) or "none"
            raise UnknownAdapter(f"no adapter {name!r} is loaded; there are: {there}")
        return self._by_name[name]

    def hold(self, loaded: LoadedAdapter) -> None:
        """A request with it begins."""
        loaded.num_requests += 1

    def release(self, loaded: LoadedAdapter) -> None:
        """A request with it has ended."""
        loaded.num_requests -= 1
        if loaded.is_unloaded and not loaded.num_requests:
            self.drop(loaded.number)

    def drop(self, number: int) -> None:
        """Lets go of an adapter's tensors; a place that no adapter changes is as if there never was one."""
        self._held.discard(number)
        for owner, attribute in self.places.values():
            site = getattr(owner, attribute)
            if site is not None:
                site.remove(number)
                if not site.changes and not site.always:
                    setattr(owner, attribute, None)
        if self.tells:
            self.dropped.append(number)

    def take_dropped(self) -> list[int]:
        dropped, self.dropped = self.dropped, []
        return dropped

    @contextmanager
    def running(self, runs: Sequence[Run], wanted: Sequence[int]) -> Iterator[None]:
        """A step of these runs, of which the rows `wanted` (in order) get logits."""
        ends = list(accumulate(num_rows for _, num_rows in runs))
        marks = [0, *(bisect_left(wanted, end) for end in ends)]
        self._rows.runs = tuple(runs)
        self._wanted_rows.runs = tuple((n, marks[i + 1] - marks[i]) for i, (n, _) in enumerate(runs))
        try:
            yield
        finally:
            self._rows.runs = self._wanted_rows.runs = ()
