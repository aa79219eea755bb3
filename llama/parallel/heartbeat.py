"""How each rank of a job knows that the machines of the others are there.

A process that dies breaks its connections, and whoever uses them hears of it. A machine that loses its power or its
network breaks none, nor does a process that was stopped: who waits for it would wait for ever, as for a request at
night. So every rank writes a number into the job's store again and again, from a thread of its own, and reads those of
the others. It does not matter how long a step takes, nor whether there is one.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from .watchdog import Watchdog, end_process

TIMEOUT_NAME = "LLAMA_HEARTBEAT_TIMEOUT"
HEARTBEAT_TIMEOUT = 20.0  # seconds, where that variable of the environment does not say another number
BEATS = 10  # in that time
GONE = b"gone"  # of a rank that has come to its end: nothing more is expected of it


class Heartbeat:
    """Tells others that this rank is there; where nothing is heard of one for `limit` seconds it calls `bark`.

    `bark` gets a line that says so, in a thread of its own, and ends the process unless another one is put there.
    `store` is this object's alone: its calls may block.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limit: float):
        self.limit = limit
        self.bark: Callable[[str], object] = lambda text: end_process(RuntimeError(text))
        self._store = store
        self._rank = rank
        self._host = socket.gethostname()
        self._heard: dict[int, bytes] = {other: b"" for other in range(size) if other != rank}
        self._silent = set(self._heard)  # since everybody was heard the last time
        self._watchdog = Watchdog(limit, lambda: self.bark(self.silence()))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def of_job(cls, rank: int, size: int, name: str) -> Heartbeat:
        """One that beats for the ranks that give the same name, in the store of the job that `torchrun` started."""
        limit = heartbeat_timeout()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=limit))
        heartbeat = cls(dist.PrefixStore(f"llama/{name}", store), rank, size, limit)
        heartbeat.start()
        return heartbeat

    def start(self) -> None:
        self._watchdog.start()
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Nobody expects this rank any more."""
        self._watchdog.stop()
        self._is_over.set()
        self._thread.join(self.limit / BEATS)

    def beat(self, number: int) -> None:
        """Tells that this rank is there, and looks who else is."""
        self._store.set(str(self._rank), f"{number} {self._host}")
        told = self._store.multi_get(list(map(str, self._heard)))
        for other, value in zip(list(self._heard), told, strict=True):
            if value != self._heard[other]:
                self._silent.discard(other)
            self._heard[other] = value
            if value == GONE:
                del self._heard[other]
        if not self._silent:
            self._watchdog.pet()
            self._silent = set(self._heard)

    def silence(self) -> str:
        """What is told of ranks that were not heard."""
        hosts = {other: self._heard.get(other, b"").decode().partition(" ")[2] for other in sorted(self._silent)}
        names = ", ".join(f"{other} on {host}" if host else str(other) for other, host in hosts.items())
        return (
            f"nothing was heard of rank {names} for {self.limit:g} s: its machine or network is gone, or its process "
            f"was stopped; {TIMEOUT_NAME} sets how long to wait"
        )

    def _run(self) -> None:
        try:
            for number in count():
                self.beat(number)
                if self._is_over.wait(self.limit / BEATS):
                    self._store.set(str(self._rank), GONE)
                    return
        except dist.DistError:  # the store is gone, and its machine with it: the watchdog tells, unless this is the end
            return


def heartbeat_timeout() -> float:
    """Seconds. Raises ValueError for what is no such number."""
    text = os.environ.get(TIMEOUT_NAME, HEARTBEAT_TIMEOUT)
    try:
        if (limit := float(text)) > 0:
            return limit
    except ValueError:
        pass
    raise ValueError(f"{TIMEOUT_NAME} is {text!r}: give a number of seconds above 0")
