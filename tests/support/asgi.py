"""Requests to an ASGI app without a socket, so that each of its messages can be chosen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from support.loops import run_async


@dataclass
class Answer:
    messages: list[dict[str, Any]] = field(default_factory=list)
    unread: list[bytes] = field(default_factory=list)  # of the request

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def scope(method: str = "GET", path: str = "/", headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    given = {"host": "localhost", **(headers or {})}
    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
    own = {"type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": b""}
    return {**own, "headers": pairs, "client": ("127.0.0.1", 4000), **more}


def ask(app: Any, scope: dict[str, Any], body: Iterable[bytes] = (b"",), then: str = "waits") -> Answer:
    """The answer to a request whose body comes in these pieces, later ones after the loop's next rounds.

    Then the client "waits" for the answer, "leaves", or "stalls": it said that there is more.
    """
    answer, was_read = Answer(unread=list(body)), [False]

    async def receive() -> dict[str, Any]:
        for _ in range(3 * was_read[0]):
            await asyncio.sleep(0)
        was_read[0] = True
        if answer.unread:
            piece = answer.unread.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(answer.unread) or then != "waits"}
        if then == "leaves":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        answer.messages.append(message)

    run_async(app(scope, receive, send))
    return answer


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An app that answers with what it saw."""
    message = await receive()
    state = scope.get("state", {})
    seen = {"path": scope["path"], "body": message["body"].decode("latin-1"), "state": sorted(state)}
    body = json.dumps(seen).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
