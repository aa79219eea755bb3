"""What a request's body may be: so large, so slow, and JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.refusing import refuse
from llama.service import Refusal

LEAST_RATE = 65536  # bytes a second: a body that is under way may take as long as it takes at that
LINGER = 5.0  # seconds that a refused client may go on sending: cut off at once, it would not see why
CLOSE = (b"connection", b"close")


class Gone(Exception):
    """The client left while it was sending."""


class Incoming:
    """What a client sends, and whether it has sent all of it."""

    def __init__(self, receive: Receive):
        self.receive = receive
        self.is_complete = False

    async def __call__(self) -> Message:
        message = await self.receive()
        self.is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class BodyLimits:
    """Middleware: reads the whole body before `app` sees the request, unless `check` refuses those of its path now.

    Refuses one of more than `max_bytes`, whatever its Content-Length said (413), one that is not here after `timeout`
    seconds (408), to which come those that its bytes take at LEAST_RATE, and one that is not plain JSON (415).
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, timeout: float, check: Callable[[str], object] = lambda path: None
    ) -> None:
        self.app = app
        self.check = check
        self.max_bytes = max_bytes
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        incoming = Incoming(receive)
        try:
            self.check(scope["path"])
            self._check_length(headers)
            check_type(headers)
            body = await self._read(incoming)
        except Refusal as refusal:
            await refuse(scope, send, refusal, [CLOSE], is_last=False)
            if refusal.status != 408:
                await linger(incoming)
            await send({"type": "http.response.body"})
            return
        except Gone:
            return
        await self.app(scope, replayed(body, incoming), send)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refusal("the Content-Length is not a number")
        if len(length) > 18 or int(length) > self.max_bytes:
            raise self._too_large()

    async def _read(self, incoming: Incoming) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.timeout) as timeout:
                end = timeout.when()
                while not incoming.is_complete:
                    message = await incoming()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        raise self._too_large()
                    timeout.reschedule(end + len(body) / LEAST_RATE)
                return bytes(body)
        except TimeoutError:
            message = f"the body is not complete after {self.timeout:g} s: send it faster"
            raise Refusal(message, status=408, code="request_timeout") from None

    def _too_large(self) -> Refusal:
        return Refusal(f"the body has more than {self.max_bytes} bytes", status=413, code="request_too_large")


def check_type(headers: Headers) -> None:
    """A browser sends JSON to another site only after it asked there, which it does not for a form or plain text."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", "identity").lower()
    if headers.get("content-length") == "0":
        return
    if media_type != "application/json":
        given = f"{media_type[:100]!r}" if media_type else "missing"
        message = f"the Content-Type is {given}: send JSON with 'Content-Type: application/json'"
        raise Refusal(message, status=415, code="unsupported_media_type")
    if encoding != "identity":
        message = f"the Content-Encoding is {encoding[:100]!r}: send the body as it is"
        raise Refusal(message, status=415, code="unsupported_media_type")


async def linger(incoming: Incoming) -> None:
    """Drops what the client still sends, until it has sent all or LINGER is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while not incoming.is_complete:
                await incoming()


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, as one message; then whatever comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
