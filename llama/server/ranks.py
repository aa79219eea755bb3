"""Several ranks that serve one model: rank 0 answers, the others follow, and none outlives the rest.

A rank that dies breaks its connections, and the next step or beat raises. One that hangs breaks nothing: so every rank
has to hear of the others again and again, and ends if it does not.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from llama.runner import Pack
from llama.server.holder import ModelHolder, RanksDiffer
from llama.streams import tell

_log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0  # how long rank 0 lets the others wait while there is nothing to do


class Watchdog:
    """Calls `bark` once, from a thread of its own, when `pet` has not been called for `limit` seconds."""

    def __init__(self, limit: float, bark: Callable[[], object]):
        self.limit = limit
        self.bark = bark
        self._last = time.monotonic()
        self._is_held = False
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.pet()
        self._thread.start()

    def pet(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def held(self) -> Iterator[None]:
        """It does not bark meanwhile: what is done may take as long as it takes."""
        self._is_held = True
        try:
            yield
        finally:
            self.pet()
            self._is_held = False

    def stop(self) -> None:
        self._is_stopped.set()

    def _watch(self) -> None:
        while not self._is_stopped.wait(max(0.0, self._last + self.limit - time.monotonic())):
            if self._is_held:
                self.pet()
            elif time.monotonic() - self._last >= self.limit:
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


def follow(holder: ModelHolder, limit: float) -> None:
    """On ranks other than 0: helps until rank 0 has ended, and ends the process if it is not heard of for `limit` s.

    Signals are rank 0's to answer, as torchrun sends them to all: it finishes what it has begun with everybody's help.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watchdog = Watchdog(limit, lambda: end_process(RuntimeError(silence(limit))))
    watchdog.start()

    def step(ints: list[int]) -> None:
        holder.llm.engine.runner.run(Pack.from_ints(ints))

    def call(name: str, *args: Any) -> None:
        try:
            with watchdog.held():
                holder.obey(name, *args)
        except RanksDiffer:
            raise
        except Exception as error:  # rank 0 has the same, and tells it
            _log.debug("%s has failed on every rank: %s", name, error)

    with together(holder.parallel.size):
        holder.parallel.follow(step, call, watchdog.pet)
    watchdog.stop()


def end_process(error: Exception | None) -> NoReturn:
    """Ends at once, whatever other threads wait for and libraries would still tidy up; with the error, if any."""
    if error is not None:
        tell(f"llama: {' '.join(str(error).split())}")
    sys.stdout.flush()
    os._exit(error is not None)
