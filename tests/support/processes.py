"""Servers in processes of their own, for what ends a process: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["llama.server.run"])  # this folder it does not find yet


@dataclass
class ServerProcesses:
    """Processes of one server, by rank, and what they wrote on standard error so far."""

    ranks: list[BaseProcess]
    reading: Connection
    told: str = ""

    @property
    def port(self) -> int:
        return int(re.search(r"http://[\d.]+:(\d+)", self.told)[1])

    def connection(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)

    def read_until(self, words: str) -> None:
        """Reads what they write until the words are there, or "" until all have ended."""
        while not words or words not in self.told:
            piece = os.read(self.reading.fileno(), 65536)
            if not piece and not words:
                return
            assert piece, self.told
            self.told += piece.decode()

    def exit_statuses(self) -> list[int]:
        for process in self.ranks:
            process.join(60)
            assert process.exitcode is not None, "the server does not end"
        self.read_until("")
        return [process.exitcode for process in self.ranks]


def serve(errors: Connection, build: Callable[[], Any], settings: dict[str, Any], environment: dict[str, str]) -> None:
    """What each process does."""
    import torch

    from llama.server.run import run_server
    from llama.server.settings import ServerSettings

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.dup2(errors.fileno(), 2)
    run_server(build, ServerSettings(**{"port": 0, "quiet": True, **settings}))


@contextmanager
def server_processes(
    build: Callable[[], Any], num_ranks: int = 1, environment: dict[str, str] | None = None, **settings: Any
) -> Iterator[ServerProcesses]:
    """A server that answers, on several ranks as under torchrun. What is left of it at the end is killed."""
    reading, writing = FORKS.Pipe(duplex=False)
    servers = ServerProcesses([], reading)
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        for rank in range(num_ranks):
            own = common | (environment or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            process = FORKS.Process(target=serve, args=(writing, build, settings, own), daemon=True)
            process.start()
            servers.ranks.append(process)
        writing.close()
        servers.read_until("Ctrl-C stops)\n")
        yield servers
    finally:
        for process in servers.ranks:
            process.kill()
            process.join()
        reading.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
