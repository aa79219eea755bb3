"""OpenAI's /v1/responses, as far as nothing has to be kept between requests.

Source: OpenAI's API reference, "Responses"; the schemas of Open Responses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.answer import Completion, Event, Query
from llama.chat import Prompt, ToolUse
from llama.generation import Llama
from llama.service.call import Call, Endpoint
from llama.service.chat import MOST_MESSAGES
from llama.service.fields import Fields, Ignored, Unserved
from llama.service.frames import Delta, Frames, deltas, json_line, server_sent
from llama.service.openai import Usage, logprob_entries
from llama.service.refusal import Refusal
from llama.service.response_items import ResponseTool, ToolChoice, input_dialog, response_tool_use
from llama.service.response_output import ResponseEvent, ResponseOutput
from llama.service.shape import ANY_OBJECT, Given, NamedSchema, Schema, ShapedBody, lenient
from llama.service.tools import AnswerReader, retold

LOGPROBS = "message.output_text.logprobs"  # the word that asks for them in `include`


class TextFormat(NamedSchema):
    """OpenAI's flat form of what chats call response_format."""

    type: Literal["text", "json_object", "json_schema"] = "text"

    def wanted(self) -> Schema | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ANY_OBJECT
        if self.schema_ is None:
            raise Refusal("text.format.schema is missing: give the schema", param="text.format.schema")
        return self.schema_ if self.strict else lenient(self.schema_)


class TextOptions(Fields):
    format: TextFormat = TextFormat()
    verbosity: Ignored = None


class ResponsesRequest(ShapedBody):
    input: str | Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES)]
    instructions: str | None = None
    tools: list[ResponseTool] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    include: list[str] = []  # of these only LOGPROBS is anything that there is
    stream: bool = False
    cache_salt: str = ""
    metadata: dict[str, str] = {}
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    max_tool_calls: int | None = None  # of tools of OpenAI's own, of which there are none
    truncation: Literal["disabled"] = "disabled"
    store: Ignored = None
    stream_options: Ignored = None
    reasoning: Ignored = None
    service_tier: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    user: Ignored = None
    background: Unserved = None
    previous_response_id: Unserved = None
    conversation: Unserved = None
    prompt: Unserved = None
    context_management: Unserved = None
    moderation: Unserved = None

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told beside each token; None: no log-probabilities are."""
        return self.top_logprobs if self.top_logprobs or LOGPROBS in self.include else None

    def given(self) -> list[Given]:
        wanted = Given("text", "json_schema", self.text.format.wanted())
        return super().given() + [wanted] * (wanted.value is not None)

    def own_params(self) -> dict[str, Any]:
        if self.n not in (None, 1):
            raise Refusal(f"n is {self.n}: a response is one answer; leave it out", param="n")
        most = {} if self.max_output_tokens is None else {"max_tokens": self.max_output_tokens}
        return {**super().own_params(), **most, "logprobs": self.num_logprobs}

    def word(self, name: str) -> str:
        own = {"logprobs": "top_logprobs", "max_tokens": "max_output_tokens"}
        return own.get(name) or super().word(name)

    def tool_use(self) -> ToolUse:
        """Raises Refusal."""
        return response_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)


def response_queries(llm: Llama, body: ResponsesRequest) -> list[Query]:
    prompt, params = Prompt(input_dialog(body.instructions, body.input)), body.params().resolve(llm.defaults)
    query = llm.chat_query(prompt, params, body.tool_use())
    return [replace(query, salt=body.cache_salt.encode())]


class ResponseReader:
    """Makes a response of the events that its one answer comes in, and tells what changes."""

    def __init__(self, llm: Llama, call: Call):
        self._llm = llm
        self._call = call
        self._reader = AnswerReader(llm, call.body.tool_use())
        self._output = ResponseOutput(call.id)
        self._usage = Usage.of(call.queries)
        self._completion: Completion | None = None
        self._error: dict[str, str] | None = None

    @property
    def status(self) -> str:
        if self._error is not None:
            return "failed"
        if self._completion is None:
            return "in_progress"
        return "incomplete" if self._completion.finish_reason == "length" else "completed"

    def read(self, events: Sequence[Event]) -> Iterable[ResponseEvent]:
        """Where log-probabilities are told, token by token: they belong to the text that a token brought."""
        rounds = [events] if self._call.body.num_logprobs is None else [[event] for event in events]
        return chain.from_iterable(self._read(delta) for delta in chain.from_iterable(map(deltas, rounds)))

    def _read(self, delta: Delta) -> Iterable[ResponseEvent]:
        self._usage.take(delta)
        logprobs = logprob_entries(delta.logprobs, self._llm.tokenizer)
        is_refused = delta.completion is not None and delta.completion.refused
        yield from self._output.add(self._reader.read(delta), logprobs, "refusal" if is_refused else "output_text")
        if delta.completion is not None:
            self._completion = delta.completion
            yield from self._output.end("incomplete" if self.status == "incomplete" else "completed")

    def fail(self, refusal: Refusal) -> Iterable[ResponseEvent]:
        """Nothing more will come."""
        yield from self._output.close("incomplete")
        self._error = {"code": refusal.code or refusal.kind, "message": str(refusal)}

    def to_json(self) -> dict[str, Any]:
        """With all keys that OpenAI's own responses have: strict clients look for them."""
        body, params = self._call.body, self._call.queries[0].params
        format = body.text.format.model_dump(by_alias=True, exclude_none=True)
        is_schema = format["type"] == "json_schema"
        return {
            "id": f"resp_{self._call.id}",
            "object": "response",
            "created_at": self._call.created,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "status": self.status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self._call.model,
            "output": self._output.items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": None,
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": format if is_schema else {"type": format["type"]}},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "tools": [tool.to_json() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "truncation": body.truncation,
            "usage": None if self._completion is None else response_usage(self._usage),
            "metadata": body.metadata,
        }


def response_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": sum(usage.num_cached_tokens.values()), "cache_write_tokens": 0},
        "output_tokens": usage.num_generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_generated_tokens,
    }


def responses_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    """What the events that brought the completion would have made."""
    reader = ResponseReader(llm, call)
    [completion] = completions
    deque(reader.read(retold(llm, completion)), maxlen=0)
    return reader.to_json()


class ResponseFrames(Frames):
    """Every change to the response, numbered, between what it is at first and what it has become."""

    def __init__(self, llm: Llama, call: Call):
        self._reader = ResponseReader(llm, call)
        self._num_sent = 0

    def push(self, events: Sequence[Event]) -> str:
        return self._opening() + "".join(map(self._frame, self._reader.read(events)))

    def end(self) -> str:
        return self._opening() + self._lifecycle(self._reader.status)

    def fail(self, refusal: Refusal) -> str:
        return self._opening() + "".join(map(self._frame, self._reader.fail(refusal))) + self._lifecycle("failed")

    def _opening(self) -> str:
        return "" if self._num_sent else self._lifecycle("created") + self._lifecycle("in_progress")

    def _lifecycle(self, name: str) -> str:
        return self._frame({"type": f"response.{name}", "response": self._reader.to_json()})

    def _frame(self, event: ResponseEvent) -> str:
        number, self._num_sent = self._num_sent, self._num_sent + 1
        return server_sent(json_line({**event, "sequence_number": number}), event["type"])


RESPONSES = Endpoint(
    ResponsesRequest, response_queries, responses_response, ResponseFrames, prompt="input", needs_model=True
)
