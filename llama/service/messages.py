"""Anthropic's /v1/messages and /v1/messages/count_tokens. Source: Anthropic's API reference, "Messages".

A last message of the assistant's is the beginning of the answer. What the cache knew of the prompt counts as
cache_read_input_tokens, and not in input_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.answer import Completion, Event, Query
from llama.chat import Message, Prompt, ToolUse
from llama.chat.tools import AnswerPiece, ToolCall
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.service.call import Call, Endpoint
from llama.service.chat import MOST_MESSAGES
from llama.service.fields import MOST_STOPS, Body, Fields, Ignored, Stop, Unserved
from llama.service.frames import Delta, Frames, deltas, json_line, server_sent
from llama.service.message_blocks import (
    MessageContent,
    MessageTool,
    MessageToolChoice,
    block_texts,
    tool_use,
    turn_messages,
)
from llama.service.openai import Usage
from llama.service.refusal import Refusal
from llama.service.shape import Schema
from llama.service.tokens import formatted, no_queries
from llama.service.tools import AnswerReader

MESSAGE_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageTurn(Fields):
    role: Literal["user", "assistant", "system"]
    content: MessageContent


class OutputFormat(Fields):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Fields):
    effort: Ignored = None
    format: OutputFormat | None = None


class CountTokensRequest(Body):
    messages: Annotated[list[MessageTurn], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: MessageContent | None = None
    tools: list[MessageTool] = []
    tool_choice: MessageToolChoice | None = None
    mcp_servers: Unserved = None
    container: Unserved = None
    output_config: OutputConfig | None = None
    thinking: Ignored = None
    cache_control: Ignored = None
    context_management: Ignored = None
    speed: Ignored = None

    def chat_prompt(self) -> Prompt:
        """Turns of one role in a row are one message, as Anthropic has them."""
        given: list[Message] = []
        if self.system is not None:
            given += [{"role": "system", "content": text} for text in block_texts("system", self.system)]
        for number, turn in enumerate(self.messages):
            given += turn_messages(f"messages.{number}.content", turn.role, turn.content)
        dialog = [message for _, group in groupby(given, itemgetter("role")) for message in joined(list(group))]
        continues = bool(dialog) and dialog[-1]["role"] == "assistant" and "tool_calls" not in dialog[-1]
        return Prompt(dialog, tools=self.tool_use().offered, continues=continues)

    def tool_use(self) -> ToolUse:
        """Raises Refusal."""
        return tool_use(self.tools, self.tool_choice)


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    metadata: Ignored = None
    service_tier: Ignored = None
    inference_geo: Ignored = None

    @property
    def json_schema(self) -> Schema | None:
        return self.output_config.format.schema_ if self.output_config and self.output_config.format else None

    def word(self, name: str) -> str:
        return "output_config" if name == "json_schema" else name


def joined(messages: list[Message]) -> list[Message]:
    """Messages of one role as one; results of tools, and what is said with calls, stay apart."""
    if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        return messages
    return [{"role": messages[0]["role"], "content": "\n".join(message["content"] for message in messages)}]


def message_queries(llm: Llama, body: MessagesRequest) -> list[Query]:
    params = SamplingParams(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences),
        json_schema=body.json_schema,
    )
    return [llm.chat_query(body.chat_prompt(), params.resolve(llm.defaults), body.tool_use())]


def message_ending(call: Call, completion: Completion, has_calls: bool) -> dict[str, Any]:
    """Why the answer ended. A text of the chat format's own that ends a turn is no stop sequence of the client's."""
    stop = completion.stop if completion.stop in call.body.stop_sequences else None
    if completion.refused:
        reason = "refusal"
    elif completion.finish_reason == "length":
        reason = "max_tokens"
    elif has_calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop}


def message_usage(usage: Usage) -> dict[str, Any]:
    """With all keys that Anthropic's own answers have: strict clients look for them."""
    num_cached = sum(usage.num_cached_tokens.values())
    return {
        "input_tokens": usage.num_prompt_tokens - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": usage.num_generated_tokens,
        "output_tokens_details": None,
        "cache_creation": None,
        "inference_geo": None,
        "server_tool_use": None,
        "service_tier": None,
    }


def message_json(call: Call, usage: Usage, content: list[dict[str, Any]], ending: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{call.id}",
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": content,
        **ending,
        "stop_details": None,
        "container": None,
        "usage": message_usage(usage),
    }


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def tool_block(call: ToolCall) -> dict[str, Any]:
    given = call.given()
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given, "caller": {"type": "direct"}}


def message_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    usage = Usage.of(call.queries, completions)
    [completion] = [llm.with_tool_calls(completion, call.body.tool_use()) for completion in completions]
    calls = completion.tool_calls or ()
    content = [text_block(completion.text)] if completion.text or not calls else []
    content += [tool_block(one) for one in calls]
    return message_json(call, usage, content, message_ending(call, completion, bool(calls)))


def count_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    return {"input_tokens": len(formatted(llm.chat_format.encode, call.body.chat_prompt))}


def message_error(refusal: Refusal) -> dict[str, Any]:
    kind = MESSAGE_ERRORS.get(refusal.status, "api_error" if refusal.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(refusal)}}


class MessageFrames(Frames):
    """A message, its blocks one after the other, and how it ended. The official client wants events named."""

    ping = server_sent('{"type":"ping"}', "ping")

    def __init__(self, llm: Llama, call: Call):
        self._call = call
        self._usage = Usage.of(call.queries)
        self._is_begun = False
        self._block: str | None = None  # the type of the block that is open
        self._num_blocks = 0
        self._reader = AnswerReader(llm, call.body.tool_use())

    def push(self, events: Sequence[Event]) -> str:
        return "".join(map(self._frames, deltas(events)))

    def end(self) -> str:
        return named_frame({"type": "message_stop"})

    def fail(self, refusal: Refusal) -> str:
        return named_frame(message_error(refusal))

    def _frames(self, delta: Delta) -> str:
        self._usage.take(delta)
        frames = "" if self._is_begun else self._opening()
        self._is_begun = True
        frames += "".join(map(self._piece, self._reader.read(delta)))
        if delta.completion is not None:
            if not self._num_blocks:
                frames += self._begin(text_block(""))
            end = message_ending(self._call, delta.completion, self._reader.has_calls)
            counts = message_usage(self._usage)
            frames += self._close() + named_frame({"type": "message_delta", "delta": end, "usage": counts})
        return frames

    def _piece(self, piece: AnswerPiece) -> str:
        if isinstance(piece, str):
            begun = "" if self._block == "text" else self._begin(text_block(""))
            return begun + self._more(f'{{"type":"text_delta","text":{json_line(piece)}}}')
        begun = "" if piece.name is None else self._begin(tool_block(ToolCall(piece.name, "", piece.id)))
        if not piece.arguments:
            return begun
        return begun + self._more(f'{{"type":"input_json_delta","partial_json":{json_line(piece.arguments)}}}')

    def _more(self, delta: str) -> str:
        index = self._num_blocks - 1
        return server_sent(f'{{"type":"content_block_delta","index":{index},"delta":{delta}}}', "content_block_delta")

    def _begin(self, block: dict[str, Any]) -> str:
        closed = self._close()
        self._block = block["type"]
        self._num_blocks += 1
        begun = {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}
        return closed + named_frame(begun)

    def _close(self) -> str:
        if self._block is None:
            return ""
        self._block = None
        return named_frame({"type": "content_block_stop", "index": self._num_blocks - 1})

    def _opening(self) -> str:
        nothing = message_json(
            self._call, Usage.of(self._call.queries), [], {"stop_reason": None, "stop_sequence": None}
        )
        return named_frame({"type": "message_start", "message": nothing})


def named_frame(event: dict[str, Any]) -> str:
    return server_sent(json_line(event), event["type"])


MESSAGES = Endpoint(
    MessagesRequest,
    message_queries,
    message_response,
    MessageFrames,
    error_json=message_error,
    prompt="messages",
    needs_model=True,
)
COUNT_TOKENS = Endpoint(CountTokensRequest, no_queries, count_response, error_json=message_error, prompt="messages")
