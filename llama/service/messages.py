"""Anthropic's /v1/messages and /v1/messages/count_tokens. Source: Anthropic's API reference, "Messages".

A last message of the assistant's is the beginning of the answer. What the cache knew of the prompt counts as
cache_read_input_tokens, and not in input_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.answer import Completion, Event, Query
from llama.chat import ChatFormatError, DialogError, Message, Prompt
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.service.call import Call, Endpoint
from llama.service.chat import MOST_MESSAGES
from llama.service.fields import MOST_STOPS, Body, Fields, Ignored, Stop, Unserved
from llama.service.frames import Delta, Frames, deltas, json_line, server_sent
from llama.service.openai import Usage
from llama.service.refusal import Refusal
from llama.service.shape import Schema
from llama.service.tokens import no_queries

MessageContent = str | list[dict[str, Any]]  # the blocks are looked at by `block_texts`
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
    tools: Unserved = None
    tool_choice: Ignored = None  # without tools there is nothing to choose
    mcp_servers: Unserved = None
    container: Unserved = None
    output_config: OutputConfig | None = None
    thinking: Ignored = None
    cache_control: Ignored = None
    context_management: Ignored = None
    speed: Ignored = None

    def chat_prompt(self) -> Prompt:
        """Turns of one role in a row are one message, as Anthropic has them."""
        given = [] if self.system is None else [("system", text) for text in block_texts("system", self.system)]
        for number, turn in enumerate(self.messages):
            given += [(turn.role, text) for text in block_texts(f"messages.{number}.content", turn.content)]
        dialog: list[Message] = [
            {"role": role, "content": "\n".join(text for _, text in group)}
            for role, group in groupby(given, itemgetter(0))
        ]
        return Prompt(dialog, continues=bool(dialog) and dialog[-1]["role"] == "assistant")


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


def block_texts(where: str, content: MessageContent) -> Iterator[str]:
    """Of the blocks, without what the model thought in earlier turns."""
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            yield block["text"]
        elif kind not in ("thinking", "redacted_thinking"):
            message = f"{where} has a block of type {str(kind)[:40]!r} that is no text: give text only"
            raise Refusal(message, param=where, code="unsupported_parameter")


def message_queries(llm: Llama, body: MessagesRequest) -> list[Query]:
    params = SamplingParams(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences),
        json_schema=body.json_schema,
    )
    return [llm.chat_query(body.chat_prompt(), params.resolve(llm.defaults))]


def message_ending(call: Call, completion: Completion) -> dict[str, Any]:
    """Why the answer ended. A text of the chat format's own that ends a turn is no stop sequence of the client's."""
    stop = completion.stop if completion.stop in call.body.stop_sequences else None
    if completion.refused:
        reason = "refusal"
    elif completion.finish_reason == "length":
        reason = "max_tokens"
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


def message_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    [completion] = completions
    content = [text_block(completion.text)]
    return message_json(call, Usage.of(call.queries, completions), content, message_ending(call, completion))


def count_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    try:
        return {"input_tokens": len(llm.chat_format.encode(call.body.chat_prompt()))}
    except (DialogError, ChatFormatError) as error:
        raise Refusal(str(error), param="messages") from error


def message_error(refusal: Refusal) -> dict[str, Any]:
    kind = MESSAGE_ERRORS.get(refusal.status, "api_error" if refusal.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(refusal)}}


class MessageFrames(Frames):
    """A message, its one block of text, pieces of that, and how it ended. The official client wants events named."""

    ping = server_sent('{"type":"ping"}', "ping")

    def __init__(self, llm: Llama, call: Call):
        self._call = call
        self._usage = Usage.of(call.queries)
        self._is_begun = False

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
        if delta.text:
            said = f'{{"type":"text_delta","text":{json_line(delta.text)}}}'
            frames += server_sent(f'{{"type":"content_block_delta","index":0,"delta":{said}}}', "content_block_delta")
        if delta.completion is not None:
            frames += named_frame({"type": "content_block_stop", "index": 0})
            end, counts = message_ending(self._call, delta.completion), message_usage(self._usage)
            frames += named_frame({"type": "message_delta", "delta": end, "usage": counts})
        return frames

    def _opening(self) -> str:
        nothing = message_json(
            self._call, Usage.of(self._call.queries), [], {"stop_reason": None, "stop_sequence": None}
        )
        block = {"type": "content_block_start", "index": 0, "content_block": text_block("")}
        return named_frame({"type": "message_start", "message": nothing}) + named_frame(block)


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
