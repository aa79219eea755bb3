"""OpenAI's /v1/chat/completions. Source: OpenAI's API reference, "Chat completions"; vLLM's further fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.answer import Completion, Event, Query
from llama.chat import Prompt
from llama.generation import Llama
from llama.service.call import Call, Endpoint
from llama.service.fields import Fields, Ignored, Unserved
from llama.service.frames import Delta, OpenAIFrames, deltas, json_line, server_sent
from llama.service.openai import StreamOptions, Usage, UsageFrames, chat_logprobs, head, opened_head
from llama.service.refusal import Refusal
from llama.service.shape import ShapedBody

MOST_MESSAGES = 4096


class ChatMessage(Fields):
    role: str
    content: str | list[dict[str, Any]] | None = None  # parts are looked at by the chat format
    name: Ignored = None  # no chat format has a place for it
    refusal: Ignored = None
    annotations: Unserved = None
    tool_calls: Unserved = None


class TemplateOptions(Fields):
    """What a client may tell the model's own template."""

    enable_thinking: bool | None = None


class Continuing(Fields):
    """Whether the answer goes on from the last message, in vLLM's pair of fields."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    def chat_prompt(self, messages: Sequence[ChatMessage], options: dict[str, Any] | None = None) -> Prompt:
        if self.continue_final_message and self.add_generation_prompt:
            raise Refusal(
                "continue_final_message and add_generation_prompt are both true: give one of them",
                param="continue_final_message",
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise Refusal(
                "add_generation_prompt is false: this is served with continue_final_message, which goes on from the "
                "last message",
                param="add_generation_prompt",
            )
        dialog = tuple(message.model_dump(include={"role", "content"}) for message in messages)
        return Prompt(dialog, options=options or {}, continues=self.continue_final_message)


class ChatRequest(ShapedBody, Continuing):
    messages: Annotated[list[ChatMessage], Field(max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: Unserved = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    cache_salt: str = ""
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    prediction: Ignored = None
    modalities: list[Literal["text"]] | None = None
    audio: Unserved = None
    functions: Unserved = None
    function_call: Unserved = None
    web_search_options: Unserved = None

    def own_params(self) -> dict[str, Any]:
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs is given without logprobs: set logprobs to true", param="top_logprobs")
        own = {**super().own_params(), "logprobs": self.top_logprobs if self.logprobs else None}
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if most == 0:
            raise Refusal("max_tokens is 0: an answer has at least 1 token", param="max_tokens")
        if most is not None:
            own["max_tokens"] = most
        return own


def chat_queries(llm: Llama, body: ChatRequest) -> list[Query]:
    if body.stream_options is not None and not body.stream:
        raise Refusal("stream_options are given without stream: set stream to true", param="stream_options")
    options = body.chat_template_kwargs.model_dump(exclude_none=True) if body.chat_template_kwargs else {}
    query = llm.chat_query(body.chat_prompt(body.messages, options), body.params().resolve(llm.defaults))
    return [Query(query.tokens, query.params, salt=body.cache_salt.encode(), refusal=query.refusal)]


def finish_reason(completion: Completion) -> str:
    return "content_filter" if completion.refused else completion.finish_reason


def chat_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    choices = [
        {
            "index": completion.index,
            "message": {
                **llm.chat_format.parse(completion.text),
                "refusal": completion.text if completion.refused else None,
                "annotations": [],
            },
            "logprobs": chat_logprobs(completion.logprobs, llm.tokenizer),
            "finish_reason": finish_reason(completion),
        }
        for completion in completions
    ]
    return {
        **head(call, "chatcmpl", "chat.completion"),
        "choices": choices,
        "usage": Usage.of(call.queries, completions).to_json(),
    }


class ChatFrames(OpenAIFrames):
    """For each choice: its role, what it says, its end; then the usage, if that is wanted."""

    def __init__(self, llm: Llama, call: Call):
        self._tokenizer = llm.tokenizer
        self._opened = opened_head(call, "chatcmpl", "chat.completion.chunk")
        self._usage = UsageFrames(Usage.of(call.queries), call.body.stream_options)
        self._begun: set[int] = set()

    def push(self, events: Sequence[Event]) -> str:
        return "".join(map(self._frames, deltas(events)))

    def end(self) -> str:
        usage = server_sent(self._usage.last(self._opened)) if self._usage.at_end else ""
        return usage + super().end()

    def _frames(self, delta: Delta) -> str:
        self._usage.usage.take(delta)
        if not delta.says_something:
            return ""
        frames = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            frames.append(self._frame(delta, '{"role":"assistant","content":null}'))
        if delta.text or delta.logprobs:
            logprobs = json_line(chat_logprobs(delta.logprobs, self._tokenizer)) if delta.logprobs else "null"
            field = "refusal" if delta.completion and delta.completion.refused else "content"
            frames.append(self._frame(delta, f'{{"{field}":{json_line(delta.text)}}}', logprobs))
        if delta.completion is not None:
            frames.append(self._frame(delta, "{}", finish=f'"{finish_reason(delta.completion)}"'))
        return "".join(frames)

    def _frame(self, delta: Delta, content: str, logprobs: str = "null", finish: str = "null") -> str:
        choice = f'{{"index":{delta.index},"delta":{content},"logprobs":{logprobs},"finish_reason":{finish}}}'
        return server_sent(f'{self._opened},"choices":[{choice}]{self._usage.tail}')


CHAT = Endpoint(ChatRequest, chat_queries, chat_response, ChatFrames, prompt="messages", needs_model=True)
