"""Several ranks that serve one model: rank 0 answers, the others follow, and none outlives the rest.

A rank that dies breaks its connections, and the next step or beat raises. One that hangs breaks nothing: so every rank
has to hear of the others again and again, and ends if it does not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from llama.generation import Llama
from llama.runner import Pack
from llama.streams import tell

CALLS = ("load_adapter", "unload_adapter")  # methods of a model that rank 0 may ask the others to call
BEAT_SECONDS = 1.0  # how long rank 0 lets the others wait while there is nothing to do


class Watchdog:
    """Calls `bark` once, from a thread of its own, when `pet` has not been called for `limit` seconds."""

    def __init__(self, limit: float, bark: Callable[[], object]):
        self.limit = limit
        self.bark = bark
        self._last = time.monotonic()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.pet()
        self._thread.start()

    def pet(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._is_stopped.set()

    def _watch(self) -> None:
        while not self._is_stopped.wait(max(0.0, self._last + self.limit - time.monotonic())):
            if time.monotonic() - self._last >= self.limit:
                self.bark()
                return


def silence(limit: float) -> str:
    """What is told of ranks that were not heard of for so long."""
    return (
        f"nothing was heard of the other ranks for {limit:g} s: one of them hangs, or a step takes longer than that; "
        "--rank-timeout sets how long to wait"
    )


@contextmanager
def together(num_ranks: int) -> Iterator[None]:
    """Where several ranks take part, an error leaves them without common ground: raises RuntimeError that says so."""
    try:
        yield
    except Exception as error:
        if num_ranks == 1:
            raise
        message = f"a rank has ended or a step has failed, and the ranks cannot go on together: {error}"
        raise RuntimeError(message) from error


def follow(llm: Llama, limit: float) -> None:
    """On ranks other than 0: helps until rank 0 has ended, and ends the process if it is not heard of for `limit` s.

    Signals are rank 0's to answer, as torchrun sends them to all: it finishes what it has begun with everybody's help.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watchdog = Watchdog(limit, lambda: end_process(RuntimeError(silence(limit))))
    watchdog.start()
    runner = llm.engine.runner

    def call(name: str, *args: Any) -> None:
        assert name in CALLS, name
        with suppress(OSError, ValueError):  # rank 0 has the same error, and tells it
            call_together(llm, name, *args)

    with together(llm.model.parallel.size):
        llm.model.parallel.follow(lambda ints: runner.run(Pack.from_ints(ints)), call, watchdog.pet)
    watchdog.stop()


def call_together(llm: Llama, name: str, *args: Any) -> Any:
    """On every rank: calls a method of the model. Raises its error, or RuntimeError where some ranks alone had one."""
    failed: Exception | None = None
    result = None
    try:
        result = getattr(llm, name)(*args)
    except (OSError, ValueError) as error:
        failed = error
    parallel = llm.model.parallel
    if 0 < (number := parallel.count(failed is not None)) < parallel.size:
        raise RuntimeError(f"{name}: {number} of {parallel.size} ranks have failed: {failed}")
    if failed is not None:
        raise failed
    return result


def end_process(error: Exception | None) -> NoReturn:
    """Ends at once, whatever other threads wait for and libraries would still tidy up; with the error, if any."""
    if error is not None:
        tell(f"llama: {' '.join(str(error).split())}")
    sys.stdout.flush()
    os._exit(error is not None)
