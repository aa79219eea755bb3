"""Where a process has its model: one at a time, or none; on several ranks all have the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.generation import Llama
from llama.parallel import SINGLE, ModelParallel, Signal, to_ints

CALLS = ("build", "close", "load_adapter", "unload_adapter")  # what rank 0 may ask the others to do as it does


class ModelHolder:
    """Builds models, one in the place of another; belongs to the thread that runs the model's steps.

    `make` builds one: without arguments the one that the process was started for, or of a checkpoint's path and
    parameters of `Llama.build` another. Rank 0's `call` does the same on every rank.
    """

    def __init__(self, make: Callable[..., Llama]):
        self.llm: Llama | None = None
        self.parallel: ModelParallel = SINGLE
        self._make = make

    def call(self, name: str, *args: Any) -> None:
        """Calls a method of this object on every rank; `args` are what JSON can hold.

        Raises its error, or RuntimeError where some ranks alone had one: then they have nothing in common any more.
        """
        if self.parallel.leads:
            self.parallel.send(Signal.CALL, to_ints([name, *args]))
        self.obey(name, *args)

    def obey(self, name: str, *args: Any) -> None:
        """What each rank does for `call`."""
        assert name in CALLS, name
        failed: Exception | None = None
        try:
            getattr(self, name)(*args)
        except Exception as error:
            failed = error
        if 0 < (number := self.parallel.count(failed is not None)) < self.parallel.size:
            raise RanksDiffer(f"{name}: {number} of {self.parallel.size} ranks have failed: {failed}")
        if failed is not None:
            raise failed

    def build(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Lets go of the model, and builds another: the first one, or that of a path."""
        self.close()
        self.llm = self._make() if path is None else self._make(path, options or {})
        self.parallel = self.llm.model.parallel
        if not self.llm.rank:
            self.llm.engine.prepare_constraints()

    def close(self) -> None:
        """Lets go of the model: its memory comes back."""
        if self.llm is not None:
            llm, self.llm = self.llm, None
            llm.close()

    def load_adapter(self, name: str, paths: Sequence[str]) -> None:
        self.llm.load_adapter(name, paths)

    def unload_adapter(self, name: str) -> None:
        self.llm.unload_adapter(name)


class RanksDiffer(RuntimeError):
    """Something was done on some ranks, and failed on others."""
