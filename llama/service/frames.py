"""An answer as it comes: pieces of text that a connection sends, in server-sent events or in lines of JSON.

A token costs one call of a ready JSON encoder: what is the same in every frame is written once.
Source: WHATWG's HTML standard, "Server-sent events".
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llama.answer import Completion, Event, FinishReason, Logprob
from llama.service.refusal import Refusal

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # at which some clients split lines


def json_line(value: Any) -> str:
    """A value as JSON on one line, whatever a reader takes for the end of a line."""
    text = _encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def server_sent(data: str, event: str | None = None) -> str:
    """One server-sent event; `data` stands on one line."""
    return f"data: {data}\n\n" if event is None else f"event: {event}\ndata: {data}\n\n"


@dataclass
class Delta:
    """What has come of one choice since the last time, as one piece."""

    place: int  # of its query
    index: int  # which of the query's n answers
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # as they came, for who has to know which text a token brought
    logprobs: list[Logprob] = field(default_factory=list)
    completion: Completion | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completion and self.completion.finish_reason

    @property
    def says_something(self) -> bool:
        """A token may be half a character, or held back: then there is nothing to send yet."""
        return bool(self.text or self.logprobs or self.completion)


def deltas(events: Sequence[Event]) -> list[Delta]:
    """The events of each choice, joined: a slow reader gets fewer and larger pieces."""
    found: dict[tuple[int, int], Delta] = {}
    for event in events:
        key = event.request_id, event.index
        delta = found.get(key) or found.setdefault(key, Delta(*key))
        delta.text += event.text
        delta.events.append(event)
        if event.token is not None:
            delta.tokens.append(event.token)
        if event.logprob is not None:
            delta.logprobs.append(event.logprob)
        if event.completion is not None:
            delta.completion = event.completion
    return list(found.values())


class Frames(ABC):
    """What is sent of one call's answer: `push` for what came, `end` behind the last of it, `fail` in its place."""

    media_type: ClassVar[str] = "text/event-stream"
    ping: ClassVar[str] = ": ping\n\n"  # a comment, which keeps proxies from closing a silent connection

    @abstractmethod
    def push(self, events: Sequence[Event]) -> str:
        """What to send of the call's events; "" where they show nothing yet."""

    @abstractmethod
    def end(self) -> str:
        """What follows the last event."""

    @abstractmethod
    def fail(self, refusal: Refusal) -> str:
        """What tells the client, in the midst of the answer, that no more of it will come."""
