"""A server of a tiny random model, on a free port, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from starlette.types import ASGIApp

from llama import Llama
from llama.answer import Event
from llama.server.app import make_app
from llama.server.run import bound, serve_on
from llama.server.server import Server
from llama.server.settings import ServerSettings
from support.tiny import ByteTokenizer, tiny_args, tiny_model


def tiny_llm(**changes: Any) -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=16, **changes)), ByteTokenizer(), chat_format="llama2")


@dataclass
class Running:
    """A server that answers. `server` belongs to its event loop: reach it through `call`."""

    server: Server
    host: str
    port: int
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        """A response whose body is still to be read."""
        connection = HTTPConnection(self.host, self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, self.headers | (headers or {}))
        return connection.getresponse()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return read(self.open("GET", path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return read(self.open("POST", path, body, headers))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until a condition holds in the server's loop."""
        for _ in range(100_000):
            if self.call(condition):
                return
        raise AssertionError("it never came to be")

    def wait_until_idle(self) -> None:
        """Until nothing is held for any request."""
        self.wait_until(lambda: not self.server.engine.streams)
        self.wait_until(lambda: not self.server.llm.engine.stats().num_referenced_blocks)

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function returns that runs in the server's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)


def read(response: HTTPResponse) -> tuple[int, Any]:
    data = response.read()
    kind = response.headers.get("content-type", "")
    return response.status, json.loads(data) if "json" in kind else data.decode()


@contextmanager
def serving(build: Callable[[], Llama] = tiny_llm, **settings: Any) -> Iterator[Running]:
    """A server until the end of the block, and then nothing of it."""
    started: list[Running] = []
    is_up = threading.Event()
    failed: list[BaseException] = []
    given = ServerSettings(**{"port": 0, "quiet": True, **settings})
    listening = bound(given)

    def started_as(server: Server, stop: Callable[[], None]) -> None:
        host, port = listening.getsockname()[:2]
        started.append(Running(server, host, port, asyncio.get_running_loop(), stop))
        is_up.set()

    def make() -> tuple[Server, ASGIApp]:
        server = Server(build, given)
        return server, make_app(server)

    def run() -> None:
        try:
            asyncio.run(serve_on(listening, make, started_as))
        except BaseException as error:
            failed.append(error)
        finally:
            is_up.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert is_up.wait(60), "the server does not start"
    try:
        if failed:
            raise failed[0]
        yield started[0]
    finally:
        if started and thread.is_alive():
            started[0].loop.call_soon_threadsafe(started[0].stop)
        thread.join(60)
        listening.close()
    assert not thread.is_alive(), "the server does not stop"
    if failed:
        raise failed[0]


class Stepwise:
    """Takes an engine's place in stepping: so many steps are taken as the test allows; commands pass between them."""

    def __init__(self, llm: Llama):
        self._step = llm.engine.step
        self._allowed = threading.Semaphore(0)
        llm.engine.step = self

    def __call__(self) -> list[Event]:
        return self._step() if self._allowed.acquire(timeout=0.001) else []

    def allow(self, num_steps: int = 100_000) -> None:
        self._allowed.release(num_steps)
