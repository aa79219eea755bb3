"""What is told of each request: a line of JSON, and an id that stands in it and in the answer.

No prompt, no answer, no query string and no header stands there; whatever a client chooses is escaped.
"""

from __future__ import annotations

import json
import re
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.refusing import refuse
from llama.service import Refusal, failure

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
PROBES = ("/health", "/metrics")  # asked every few seconds: told only where they fail
MOST_CHARACTERS = 200  # of what a client chose


class RequestLog:
    """Middleware, outside all others: numbers a request, answers 500 where `app` fails, and tells what came of it.

    `write` gets each line, `tell_failure` the trace of each failure, `count` the status of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        write: Callable[[str], object],
        tell_failure: Callable[[str], object],
        count: Callable[[int], object] = lambda status: None,
    ) -> None:
        self.app = app
        self.write = write
        self.tell_failure = tell_failure
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        entry = LogEntry(scope, given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": entry.request_id}}
        try:
            await self.app(scope, entry.receiving(receive), entry.sending(send))
        except ConnectionError:  # the client's doing
            pass
        except Exception as error:
            self.tell_failure(f"request {entry.request_id} failed: {''.join(traceback.format_exception(error))}")
            if entry.status is None:  # half an answer is not ended: the connection is closed
                await refuse(scope, entry.sending(send), unexpected(entry.request_id))
        finally:
            if entry.status is not None:
                self.count(entry.status)
            if not (entry.is_probe and entry.status == 200):
                self.write(log_line(entry.to_json()))


def unexpected(request_id: str) -> Refusal:
    """What a client is told of a failure: where to look, and nothing of how the server is made."""
    return failure(f"the server failed; its log says more under request id {request_id}")


class LogEntry:
    """What is known of one request."""

    def __init__(self, scope: Scope, request_id: str):
        self.request_id = request_id
        self.scope = scope
        self.begin = time.monotonic()
        self.status: int | None = None
        self.is_complete = False
        self.first_byte: float | None = None  # seconds until it was sent
        self.num_received = 0
        self.num_sent = 0

    @property
    def is_probe(self) -> bool:
        return self.scope["path"] in PROBES

    def receiving(self, receive: Receive) -> Receive:
        async def counted() -> Message:
            message = await receive()
            self.num_received += len(message.get("body", b""))
            return message

        return counted

    def sending(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), self.header]}
            elif message["type"] == "http.response.body":
                self.num_sent += len(message.get("body", b""))
                self.is_complete = not message.get("more_body", False)
                if self.first_byte is None:
                    self.first_byte = time.monotonic() - self.begin
            await send(message)

        return counted

    @property
    def header(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self.request_id.encode()

    def to_json(self) -> dict[str, Any]:
        client = self.scope.get("client")
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "client": f"{client[0]}:{client[1]}" if client else None,
            "method": self.scope["method"][:MOST_CHARACTERS],
            "path": self.scope["path"][:MOST_CHARACTERS],
            "status": self.status,
            "complete": self.is_complete,  # false: the client left, or the answer was cut off
            "ms": milliseconds(time.monotonic() - self.begin),
            "first_byte_ms": milliseconds(self.first_byte),
            "bytes_received": self.num_received,
            "bytes_sent": self.num_sent,
        }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)


def log_line(entry: dict[str, Any]) -> str:
    """ASCII without control characters, whatever stands in the entry."""
    return json.dumps(entry).replace("\x7f", "\\u007f")
