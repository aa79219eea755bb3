"""Answering a request with a refusal, in the form of its path's wire."""

from __future__ import annotations

import json
from collections.abc import Iterable

from starlette.types import Scope, Send

from llama.service import Refusal, error_form

Header = tuple[bytes, bytes]


def error_body(path: str, refusal: Refusal) -> bytes:
    return json.dumps(error_form(path)(refusal)).encode()


async def refuse(
    scope: Scope, send: Send, refusal: Refusal, headers: Iterable[Header] = (), *, is_last: bool = True
) -> None:
    """Sends the whole answer; with `is_last` false its end is the caller's to send."""
    body = error_body(scope["path"], refusal)
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after is not None:
        own.append((b"retry-after", str(refusal.retry_after).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})
