"""Several ranks that serve one model: rank 0 answers, the others follow, and none outlives the rest.

A rank that dies breaks its connections, and the next step or beat raises. One that hangs breaks nothing: so every rank
has to hear of the others again and again, and ends if it does not.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama.parallel import Watchdog, end_process
from llama.runner import Pack
from llama.server.holder import ModelHolder, RanksDiffer

_log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0  # how long rank 0 lets the others wait while there is nothing to do


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
