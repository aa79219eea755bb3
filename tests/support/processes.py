"""Servers in processes of their own, for what ends a process: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["llama.server.run"])  # this folder it does not find yet


@dataclass
class ServerProcess:
    process: BaseProcess
    port: int
    errors: int  # the descriptor from which its standard error is read

    def connection(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def exit_status(self) -> int:
        self.process.join(60)
        assert self.process.exitcode is not None, "the server does not end"
        return self.process.exitcode

    def told(self) -> str:
        """What it wrote on standard error, until it ended."""
        return b"".join(iter(lambda: os.read(self.errors, 65536), b"")).decode()


def serve(errors: Connection, model: dict[str, Any], settings: dict[str, Any]) -> None:
    """What the process does."""
    import torch

    from llama.server.run import run_server
    from llama.server.settings import ServerSettings
    from support.server import tiny_llm

    torch.set_num_threads(1)
    os.dup2(errors.fileno(), 2)
    run_server(lambda: tiny_llm(**model), ServerSettings(**{"port": 0, "quiet": True, **settings}))


@contextmanager
def server_process(model: dict[str, Any], **settings: Any) -> Iterator[ServerProcess]:
    """A server of a tiny model, of these sizes, that answers. What is left of it at the end of the block is killed."""
    reading, writing = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=serve, args=(writing, model, settings), daemon=True)
    process.start()
    writing.close()
    try:
        said = b""
        while b"(Ctrl-C stops)\n" not in said:
            piece = os.read(reading.fileno(), 65536)
            assert piece, said.decode()
            said += piece
        yield ServerProcess(process, int(re.search(rb"http://[\d.]+:(\d+)", said)[1]), reading.fileno())
    finally:
        process.kill()
        process.join()
        reading.close()
