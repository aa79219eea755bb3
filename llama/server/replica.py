"""One of many replicas: the server's own application in a process that somebody else begins, watches and asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Message

from llama.generation import Llama
from llama.server.app import make_app
from llama.server.ranks import end_process
from llama.server.server import Server
from llama.server.settings import ServerSettings

PAUSE = 0.02  # seconds between two rounds of an answer's messages: each costs two milliseconds on its way
MOST_ROUNDS = 400  # a second, of all answers together
LAST_WORDS = 0.5  # seconds in which streams are told that the engine has ended


@dataclass(frozen=True)
class Forwarded:
    """A request that has passed the guard elsewhere. `begins`: see `affinity.beginnings`."""

    scope: dict[str, Any]  # of ASGI, as far as it is plain data
    body: bytes
    begins: list[bytes]


class Replica:
    """A server without a listener. `engine` is the label of its metrics: which replica it is.

    Where its engine ends, so does its process: whoever watches it begins another.
    """

    def __init__(self, build: Callable[..., Llama], settings: ServerSettings, engine: str = "0"):
        self._server = Server(build, settings)
        self._server.metrics.labels["engine"] = engine
        self._app = make_app(self._server)
        self._watching: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Loads the model. Raises what kept it from loading."""
        await self._server.start()
        self._watching = [
            asyncio.create_task(self._server.metrics.watch_loop()),
            asyncio.create_task(self._end_with_engine()),
        ]

    async def close(self) -> None:
        """Ends the engine's thread."""
        for task in self._watching:
            task.cancel()
        await self._server.close()

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """The messages of the application's answer, as many at a time as have come since the last ones.

        Closing it ends the request, as a client does that leaves.
        """
        sent: list[Message] = []
        woken, is_read = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal is_read
            if is_read:
                await asyncio.Event().wait()
            is_read = True
            return {"type": "http.request", "body": request.body, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)
            woken.set()

        answering = asyncio.create_task(self._app(request.scope, receive, send))
        answering.add_done_callback(lambda done: woken.set())
        try:
            while not answering.done() or sent:
                await woken.wait()
                woken.clear()
                if sent:
                    messages, sent[:] = list(sent), []
                    yield messages
                    await asyncio.sleep(max(PAUSE, self._server.num_open / MOST_ROUNDS))
            answering.result()
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def name(self) -> str:
        """What the model is called."""
        return self._server.name

    async def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return self._server.metrics.text()

    async def fail(self, error: str) -> None:
        """Ends what is being answered, with this error."""
        self._server.is_draining = True
        self._server.fail(error)

    async def check_health(self) -> None:
        """Raises RuntimeError where the engine has ended."""
        if self._server.ended.done() or not self._server.engine.is_alive():
            raise RuntimeError("the engine of this replica has ended")

    async def _end_with_engine(self) -> None:
        await asyncio.wait([self._server.ended])
        await asyncio.sleep(LAST_WORDS)
        end_process(self._server.ended.exception() or RuntimeError("the engine of this replica has ended"))
