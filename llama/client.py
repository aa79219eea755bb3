"""A model behind a server, asked over HTTP as OpenAI's clients ask: what `llama chat --url` talks with.

    model = RemoteModel("http://127.0.0.1:8000", api_key=None)
    for piece in model.stream_chat([{"role": "user", "content": "Hello"}], SamplingParams()):
        print(piece, end="")

It needs no torch, and nothing but the standard library. Source: OpenAI's API reference, "Chat completions".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from llama.chat import Dialog, Message, Prompt, shortened
from llama.sampling_params import SAMPLING_FIELDS, SamplingParams

MOST_SILENCE = 300.0  # seconds that a server may be silent
LONGEST = 1 << 20  # bytes of an error's body that are looked at


class RemoteError(RuntimeError):
    """A server cannot be reached, refuses, or breaks off; in one line. `code` is OpenAI's word for it, if any."""

    def __init__(self, message: str, code: str | None = None):
        super().__init__(" ".join(message.split())[:500])
        self.code = code


class _Staying(HTTPRedirectHandler):
    """Follows no redirection: it would take the key along to wherever that leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


class PlainMessages:
    """What is known of a remote model's chat format: an answer is its text."""

    def parse(self, text: str) -> Message:
        return {"role": "assistant", "content": text}

    def is_unsafe(self, prompt: Prompt | Dialog) -> bool:
        return False


class RemoteModel:
    """The first model that a server lists. Raises ValueError for what is no address, RemoteError."""

    rank = 0
    chat_format = PlainMessages()

    def __init__(self, url: str, api_key: str | None = None):
        """`url` is the server's address, with the API's /v1 behind it or without."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url[:200]!r} is no server's address: give one like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._opener = build_opener(_Staying)
        with self._asked("/v1/models") as response:
            listed = _parsed(response.read())
        try:
            self.name: str = listed["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise RemoteError(f"{self.url} lists no models: is it a server with OpenAI's API?") from None

    def share(self, value: Any) -> Any:
        return value

    def fit(self, dialog: Dialog, params: SamplingParams) -> Dialog:
        """The dialog as it is: the server counts its tokens, and `stream_chat` hears of it."""
        return dialog

    def stream_chat(self, dialog: Dialog, params: SamplingParams) -> Iterator[str]:
        """The pieces of one answer as they come; closing the iterator ends it on the server too.

        Of a dialog that the server finds too long the oldest turns are left out, one by one.
        """
        body = {"model": self.name, "stream": True, **given_params(params)}
        *all_but_last, last = shortened(dialog)
        for rest in all_but_last:
            try:
                return (yield from self._stream(body | {"messages": rest}))
            except RemoteError as error:
                if error.code != "context_length_exceeded":
                    raise
        yield from self._stream(body | {"messages": last})

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        with self._asked("/v1/chat/completions", body) as response:
            for line in response:
                name, _, data = line.decode(errors="replace").strip().partition(":")
                if name != "data":
                    continue
                if data.strip() == "[DONE]":
                    return
                yield from pieces(_parsed(data))
        raise RemoteError(f"{self.url} broke the answer off")

    @contextmanager
    def _asked(self, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(Request(self.url + path, data, self._headers), timeout=MOST_SILENCE) as response:
                yield response
        except HTTPError as error:
            raise refusal_of(error, self.url + path) from None
        except URLError as error:
            raise RemoteError(f"{self.url} cannot be reached: {reason(error.reason)}") from None
        except (OSError, HTTPException) as error:
            raise RemoteError(f"{self.url} broke the connection: {reason(error)}") from None


def given_params(params: SamplingParams) -> dict[str, Any]:
    """What was asked for, in OpenAI's names; what was not is the server's to choose."""
    defaults = SamplingParams()
    names = [field.name for field in fields(params) if SAMPLING_FIELDS[field.name].body]
    return {name: value for name in names if (value := getattr(params, name)) != getattr(defaults, name)}


def pieces(chunk: Any) -> Iterator[str]:
    """What a chunk says. Raises RemoteError where it says that something went wrong."""
    if error := chunk.get("error"):
        raise RemoteError(error_message(chunk), error.get("code") if isinstance(error, dict) else None)
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if refused := delta.get("refusal"):
            raise RemoteError(refused)
        if content := delta.get("content"):
            yield content


def error_message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "the server gives no reason")


def refusal_of(error: HTTPError, where: str) -> RemoteError:
    """What the server said with its status, and what may help."""
    try:
        body = json.loads(error.read(LONGEST))
    except (ValueError, OSError, HTTPException):
        body = None
    message = error_message(body) if body else error.reason
    if error.code == 401:
        message += "; give --api-key, or set LLAMA_API_KEY"
    if error.code == 429 and (seconds := error.headers.get("Retry-After")):
        message += f"; try again in {seconds} s"
    told = body.get("error") if isinstance(body, dict) else None
    return RemoteError(f"{where}: {error.code}: {message}", told.get("code") if isinstance(told, dict) else None)


def reason(error: object) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _parsed(data: bytes | str) -> Any:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RemoteError("the server's answer is not of OpenAI's form: is it a server with OpenAI's API?")
    return found
