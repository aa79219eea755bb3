"""A call's answer on its connection: in one piece, or as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from llama.answer import Completion
from llama.server.connection import ABORT
from llama.server.refusing import refusal_response
from llama.server.server import Server
from llama.server.stream import CallStream
from llama.service import Call, Refusal, failure

PATIENCE = 5.0  # seconds that a stream's head waits for the first event, so that an error can still be a status
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy holds it back


class CallResponse(Response):
    """Answers a call. What it holds of the engine is given back when it returns, whatever happened.

    A client that leaves ends its call; one that does not read for `send_timeout` seconds is left.
    """

    def __init__(self, server: Server, call: Call):
        self.server = server
        self.call = call
        self.llm = server.llm
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self.server.engine.open(self.call)
        answer = self._stream if self.call.body.is_streamed else self._whole
        send = limited(scope, send, self.server.settings.send_timeout)
        try:
            await unless_left(answer(stream, scope, receive, send), receive)
        finally:
            self.server.engine.close(stream)

    async def _whole(self, stream: CallStream, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            completions: list[Completion] = []
            async with asyncio.timeout(self.server.settings.timeout):
                async for events in stream.rounds():
                    completions += [event.completion for event in events if event.completion]
            body = await self.server.in_pool(self.call.respond, self.llm, completions)
            response = JSONResponse(body)
        except (Refusal, RuntimeError, TimeoutError) as error:
            response = refusal_response(scope["path"], self._refusal(error))
        await response(scope, receive, send)

    async def _stream(self, stream: CallStream, scope: Scope, receive: Receive, send: Send) -> None:
        frames = self.call.frames(self.llm)
        is_begun = False

        async def write(text: str) -> None:
            nonlocal is_begun
            if not is_begun:
                headers = STREAM_HEADERS | {"content-type": f"{frames.media_type}; charset=utf-8"}
                raw = [(name.encode(), value.encode()) for name, value in headers.items()]
                await send({"type": "http.response.start", "status": 200, "headers": raw})
                is_begun = True
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        try:
            silence = self.server.settings.ping or None
            async with asyncio.timeout(self.server.settings.timeout):
                async for events in stream.rounds(PATIENCE, silence):
                    if text := frames.push(events) if events else frames.ping:
                        await write(text)
            await write(frames.end())
        except (Refusal, RuntimeError, TimeoutError) as error:
            if not is_begun:
                response = refusal_response(scope["path"], self._refusal(error))
                return await response(scope, receive, send)
            await write(frames.fail(self._refusal(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _refusal(self, error: Exception) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, TimeoutError):
            most = self.server.settings.timeout
            return Refusal(f"the answer took longer than {most:g} s", status=408, kind="timeout_error", code="timeout")
        if self.server.is_draining or self.server.loading is not None:
            return self.server.unavailable()
        return failure(str(error))


def limited(scope: Scope, send: Send, timeout: float) -> Send:
    """`send`, which gives a client only so many seconds to read; then its connection is cut off."""
    abort = scope.get("extensions", {}).get(ABORT)

    async def limited_send(message: Message) -> None:
        try:
            async with asyncio.timeout(timeout):
                await send(message)
        except TimeoutError:
            if abort is not None:
                abort["call"]()
            raise ConnectionAbortedError("the client does not read") from None

    return limited_send


async def unless_left(answer: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Awaits an answer, which is cancelled where its client leaves first; the request's body has been read by now."""
    answering, leaving = asyncio.create_task(answer), asyncio.create_task(left(receive))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def left(receive: Receive) -> None:
    """Returns when the client is gone; the request's body has been read by now."""
    while (await receive())["type"] != "http.disconnect":
        pass
