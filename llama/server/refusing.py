"""Answering a request with a refusal, in the form of its path's wire."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.responses import JSONResponse, Response
from starlette.types import Scope, Send

from llama.service import Refusal, error_form

Header = tuple[bytes, bytes]
RETRY_AFTER = 1  # seconds


def refusal_response(path: str, refusal: Refusal) -> Response:
    """What a client gets in place of an answer."""
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    return JSONResponse(error_form(path)(refusal), refusal.status, headers)


async def refuse(
    scope: Scope, send: Send, refusal: Refusal, headers: Iterable[Header] = (), *, is_last: bool = True
) -> None:
    """Sends the whole answer; with `is_last` false its end is the caller's to send."""
    response = refusal_response(scope["path"], refusal)
    start = {"type": "http.response.start", "status": refusal.status, "headers": [*response.raw_headers, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": response.body, "more_body": not is_last})


def unavailable(message: str) -> Refusal:
    """For a request that may be tried again in a moment."""
    return Refusal(message, status=503, kind="unavailable_error", code="unavailable", retry_after=RETRY_AFTER)
