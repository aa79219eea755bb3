"""Tools on every wire: what is on offer, and an answer's text and calls as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from llama.answer import Completion, Event
from llama.chat.tools import AnswerPiece, ToolError, ToolParser, ToolUse, merged
from llama.generation import Llama
from llama.service.frames import Delta
from llama.service.refusal import Refusal


def offered(tools: Sequence[dict[str, Any]], choice: str = "auto", parallel: bool = True) -> ToolUse:
    """Tools as OpenAI's API has them, and which of them to call. Raises Refusal."""
    try:
        return ToolUse(tools, choice, parallel)
    except ToolError as error:
        raise Refusal(str(error), param=error.param) from error


def retold(llm: Llama, completion: Completion) -> list[Event]:
    """The events that a completion might have come in."""
    told = llm.chat_format.retold(completion.text, completion.tokens)
    pairs = zip_longest(told, completion.logprobs or ())
    events = [Event(completion.place, completion.index, token, text, logprob) for (text, token), logprob in pairs]
    return [*events[:-1], replace(events[-1], completion=completion)]


class AnswerReader:
    """Takes one answer apart while it comes; without tools on offer all of it is text."""

    def __init__(self, llm: Llama, use: ToolUse):
        self._parser: ToolParser | None = None
        if use.offered:
            format = llm.chat_format.tool_format
            self._parser = ToolParser(format, use.callable_names, format.controls)

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.has_calls

    def read(self, delta: Delta) -> list[AnswerPiece]:
        """The text and the calls that a delta has brought. A refusal is text."""
        if self._parser is None or (delta.completion and delta.completion.refused):
            return [delta.text] * bool(delta.text)
        found = [piece for event in delta.events for piece in self._parser.push(event.text, event.token)]
        return merged(found + (self._parser.end() if delta.completion is not None else []))
