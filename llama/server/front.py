"""What stands before many replicas of one model: listens, looks at requests once, and has one of them answer each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from llama.server.affinity import beginnings
from llama.server.metrics import CONTENT_TYPE, Metrics
from llama.server.refusing import refusal_response, unavailable
from llama.server.replica import Forwarded
from llama.server.response import limited, unless_left
from llama.server.settings import ServerSettings
from llama.service import Refusal
from llama.streams import tell

MOST_TRIES = 3  # of a request whose replicas were lost: what kills one after the other must end somewhere
LARGE = 1 << 16  # bytes of a body that is not looked at in the event loop
FORWARDED_KEYS = ("type", "http_version", "scheme", "method", "path", "query_string", "headers", "client", "state")


class ReplicaLost(Exception):
    """The replica that was answering is no more, or not to be reached."""


class Fleet(Protocol):
    """Replicas, wherever they are."""

    async def start(self) -> str:
        """Returns the model's name when all answer. Raises RuntimeError where they cannot."""

    def answer(self, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """What one of them answers; see `Replica.answer`. Raises ReplicaLost."""

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """What a method of all that can be reached returns."""

    async def watch(self) -> None:
        """Raises RuntimeError when none will be reached any more."""

    async def close(self) -> None:
        """None is left."""


class Front:
    """The application, and the `Service`, of a fleet.

    A request whose replica is lost goes to another as long as nothing of its answer was sent. After that its connection
    is cut: no client takes half an answer for a whole one.
    """

    def __init__(self, fleet: Fleet, settings: ServerSettings):
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.labels["engine"] = "front"
        self.is_draining = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.name = settings.name or ""
        self._fleet = fleet
        self._is_started = False
        self._failing: asyncio.Task[Any] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when all replicas answer."""
        self.name = await self._fleet.start()
        self.metrics.watch(None, self.name)
        self._is_started = True
        self._watching = asyncio.create_task(self._watch())

    def check_body(self, path: str) -> None:
        """Raises Refusal while replicas start, and once a stop was asked for."""
        if self.is_draining:
            raise unavailable("the server is stopping")
        if not self._is_started:
            raise unavailable("the replicas are starting")

    def fail(self, error: str) -> None:
        """Has every replica end what it answers, with this error."""
        self._failing = asyncio.create_task(self._fleet.ask("fail", error))

    async def close(self) -> None:
        """Ends the fleet."""
        for task in (self._failing, self._watching):
            if task is not None:
                task.cancel()
        await self._fleet.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        send = limited(scope, send, self.settings.send_timeout)
        try:
            if scope["path"] == "/metrics":
                response = Response(await self._all_metrics(), media_type=CONTENT_TYPE)
            else:
                self.check_body(scope["path"])
                if scope["path"] != "/health":
                    await self._forward(scope, receive, send)
                    return
                response = JSONResponse({"status": "ok"})
        except Refusal as refusal:
            response = refusal_response(scope["path"], refusal)
        await response(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Starts and closes where whoever runs the application does not, but says when."""
        await receive()
        try:
            await self.start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch(self) -> None:
        try:
            await self._fleet.watch()
        except RuntimeError as error:
            self.ended.set_exception(error)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has it answered, unless the client leaves before that."""
        body = await whole_body(receive)
        salt = scope.get("state", {}).get("key") or b""
        begins = await asyncio.to_thread(beginnings, body, salt) if len(body) > LARGE else beginnings(body, salt)
        request = Forwarded({name: scope[name] for name in FORWARDED_KEYS if name in scope}, body, begins)
        await unless_left(self._answer(request, send), receive)

    async def _answer(self, request: Forwarded, send: Send) -> None:
        is_begun = False
        for _ in range(MOST_TRIES):
            try:
                async with aclosing(self._fleet.answer(request)) as rounds:
                    async for messages in rounds:
                        for message in messages:
                            is_begun = True
                            await send(message)
                return
            except ReplicaLost as error:
                tell(f"llama: warning: a replica was lost while it answered: {error}")
                if is_begun:
                    raise ConnectionAbortedError("the replica is lost, and with it the rest of the answer") from error
        raise unavailable(f"{MOST_TRIES} replicas were lost over this request")

    async def _all_metrics(self) -> str:
        texts = await self._fleet.ask("metrics") if self._is_started else []
        return merge_metrics([text.decode() for text in (self.metrics.text(), *texts)])


async def whole_body(receive: Receive) -> bytes:
    """A request's body, of which somebody else has seen to it that it comes to an end."""
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)


def merge_metrics(texts: Iterable[str]) -> str:
    """Several texts in Prometheus' format as one: a metric's samples must stand together, below one head."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for family in re.split(r"^(?=# HELP )", text, flags=re.MULTILINE)[1:]:
            help, type, samples = family.split("\n", 2)
            families.setdefault(f"{help}\n{type}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())
