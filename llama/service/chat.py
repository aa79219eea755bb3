"""OpenAI's /v1/chat/completions. Source: OpenAI's API reference, "Chat completions"; vLLM's further fields."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from llama.answer import Completion, Query
from llama.chat import ChatFormat, ChatFormatError, Prompt, ToolUse, fit_prompt, given_format
from llama.chat.tools import AnswerPiece
from llama.generation import Llama
from llama.service.call import Call, Endpoint
from llama.service.fields import Fields, Ignored, Unserved
from llama.service.frames import Delta, json_line
from llama.service.openai import OpenAIFrames, StreamOptions, Usage, chat_logprobs, head
from llama.service.refusal import Refusal
from llama.service.shape import ShapedBody
from llama.service.tools import AnswerReader, offered

MOST_MESSAGES = 4096
MOST_CALLS = 128  # of a message


class ChatMessage(Fields):
    role: str
    content: str | list[dict[str, Any]] | None = None  # parts are looked at by the chat format
    name: str | None = None  # of a tool; no chat format has a place for anybody else's
    refusal: Ignored = None
    annotations: Unserved = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MOST_CALLS)] | None = None
    tool_call_id: str | None = None

    def to_message(self) -> dict[str, Any]:
        """As chat formats take it; a developer is who OpenAI's newer clients call the system."""
        message = self.model_dump(exclude={"refusal", "annotations"})
        return message | {"role": "system"} if self.role == "developer" else message


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Fields):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoices(Fields):
    """OpenAI's way to allow some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TemplateOptions(Fields):
    """What a client may tell the model's own template."""

    enable_thinking: bool | None = None


TEMPLATES = ("chat_template", "instruction_template", "instruction_template_str")
LONGEST_TEMPLATE = 64 * 1024
Template = Annotated[str, Field(max_length=LONGEST_TEMPLATE)]


class PromptFields(Fields):
    """What a prompt is made of besides messages; vLLM's pair of fields says whether it goes on from the last one."""

    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | ToolChoices = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: Template | None = Field(None, description="vLLM's: a template in Jinja; or a chat format's name.")
    instruction_template: Template | None = Field(None, description="text-generation-webui's name of chat_template.")
    instruction_template_str: Template | None = Field(None, description="The same, where it is a template.")
    truncation_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description="text-generation-webui's: the oldest turns are left out until prompt and answer fit."
    )
    _chat_format: ChatFormat | None = PrivateAttr(None)

    def speaking(self, llm: Llama) -> Llama:
        """The model in the chat format that is asked for. Raises Refusal."""
        names = [name for name in TEMPLATES if getattr(self, name) is not None]
        if not names:
            return llm
        if len(names) > 1:
            raise Refusal(f"{names[1]} is given beside {names[0]}: give one of them", param=names[1])
        if self._chat_format is None:
            try:
                self._chat_format = given_format(getattr(self, names[0]), llm.tokenizer)
            except ChatFormatError as error:
                raise Refusal(f"{names[0]}: {error}", param=names[0]) from error
        return llm.speaking(self._chat_format)

    def tool_use(self) -> ToolUse:
        """Raises Refusal."""
        choice, tools = self.tool_choice, self.tools
        if isinstance(choice, ToolChoices):
            allowed = choice.allowed_tools
            names = [tool.function.name for tool in allowed.tools]
            tools = [tool for tool in tools if function_name(tool) in names]
            choice = allowed.mode
        elif isinstance(choice, NamedTool):
            choice = choice.function.name
        return offered(tools, choice, self.parallel_tool_calls)

    def chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises Refusal."""
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
        dialog = tuple(message.to_message() for message in messages)
        options = self.chat_template_kwargs.model_dump(exclude_none=True) if self.chat_template_kwargs else {}
        return Prompt(dialog, self.tool_use().offered, options, self.continue_final_message)


class ChatRequest(ShapedBody, PromptFields):
    messages: Annotated[list[ChatMessage], Field(max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
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


def function_name(tool: dict[str, Any]) -> str | None:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def chat_queries(llm: Llama, body: ChatRequest) -> list[Query]:
    if body.stream_options is not None and not body.stream:
        raise Refusal("stream_options are given without stream: set stream to true", param="stream_options")
    prompt, params = body.chat_prompt(body.messages), body.params().resolve(llm.defaults)
    llm = body.speaking(llm)
    if body.truncation_length is not None:
        length = min(body.truncation_length, llm.max_seq_len)
        room = min(params.max_tokens or length // 4, length // 2)
        prompt = fit_prompt(prompt, length - room, llm.chat_format)
    query = llm.chat_query(prompt, params, body.tool_use())
    return [replace(query, salt=body.cache_salt.encode())]


def finish_reason(completion: Completion, has_calls: bool = False, use: ToolUse | None = None) -> str:
    """As OpenAI has it: calls end an answer with a word of their own, except those of the one tool that was named."""
    if completion.refused:
        return "content_filter"
    is_calling = has_calls and completion.finish_reason == "stop" and not use.is_named
    return "tool_calls" if is_calling else completion.finish_reason


def chat_message(llm: Llama, completion: Completion) -> dict[str, Any]:
    message = {
        **llm.chat_format.parse(completion.text),
        "refusal": completion.text if completion.refused else None,
        "annotations": [],
    }
    if completion.tool_calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [call.to_json() for call in completion.tool_calls]
    return message


def chat_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    use, llm = call.body.tool_use(), call.body.speaking(llm)
    usage = Usage.of(call.queries, completions).to_json()
    completions = [llm.with_tool_calls(completion, use) for completion in completions]
    choices = [
        {
            "index": completion.index,
            "message": chat_message(llm, completion),
            "logprobs": chat_logprobs(completion.logprobs, llm.tokenizer),
            "finish_reason": finish_reason(completion, bool(completion.tool_calls), use),
        }
        for completion in completions
    ]
    return {
        **head(call, "chatcmpl", "chat.completion"),
        "choices": choices,
        "usage": usage,
    }


class ChatFrames(OpenAIFrames):
    """For each choice: its role, what it says, its end; then the usage, if that is wanted."""

    def __init__(self, llm: Llama, call: Call):
        super().__init__(call, "chatcmpl", "chat.completion.chunk")
        self._tokenizer = llm.tokenizer
        self._begun: set[int] = set()
        self._use = use = call.body.tool_use()
        llm = call.body.speaking(llm)
        self._readers: dict[int, AnswerReader] = defaultdict(lambda: AnswerReader(llm, use))  # by choice

    def frame(self, delta: Delta) -> str:
        if not delta.says_something:
            return ""
        logprobs = json_line(chat_logprobs(delta.logprobs, self._tokenizer)) if delta.logprobs else "null"
        field = "refusal" if delta.completion and delta.completion.refused else "content"
        reader = self._readers[delta.index]
        said = reader.read(delta) or [""] * bool(delta.logprobs)
        frames = []
        if delta.index not in self._begun and (said or delta.completion):
            self._begun.add(delta.index)
            frames.append(self._chunk(delta, '{"role":"assistant","content":null}'))
        for piece in said:
            frames.append(self._chunk(delta, delta_json(piece, field), logprobs))
            logprobs = "null"  # they are told once
        if delta.completion is not None:
            reason = finish_reason(delta.completion, reader.has_calls, self._use)
            frames.append(self._chunk(delta, "{}", finish=f'"{reason}"'))
        return "".join(frames)

    def _chunk(self, delta: Delta, content: str, logprobs: str = "null", finish: str = "null") -> str:
        return self.chunk(f'{{"index":{delta.index},"delta":{content},"logprobs":{logprobs},"finish_reason":{finish}}}')


def delta_json(piece: AnswerPiece, field: str) -> str:
    """What a chunk says. Clients join what chunks say: a call's id and name stand in its first one only."""
    if isinstance(piece, str):
        return f'{{"{field}":{json_line(piece)}}}'
    function: dict[str, Any] = {"arguments": piece.arguments}
    call: dict[str, Any] = {"index": piece.index}
    if piece.name is not None:
        call |= {"id": piece.id, "type": "function"}
        function = {"name": piece.name, **function}
    return json_line({"tool_calls": [{**call, "function": function}]})


CHAT = Endpoint(ChatRequest, chat_queries, chat_response, ChatFrames, prompt="messages", needs_model=True)
