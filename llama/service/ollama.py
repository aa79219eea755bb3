"""Ollama's /api/chat, /api/generate and /api/embed, which editors ask. Source: Ollama's docs/api.md.

Answers are streamed unless a client says otherwise. A last message of the assistant's is the beginning of the answer.
Durations are nanoseconds from the moment that the request was understood; an answer in one piece does not tell how
long its prompt took, and counts it in eval_duration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from llama.answer import Completion, Event, Logprob, Query, unit_vectors
from llama.chat import Message, Prompt, ToolUse
from llama.chat.tools import AnswerPiece, Spoken, ToolCall
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.service.call import Call, Endpoint
from llama.service.chat import MOST_MESSAGES
from llama.service.completions import prompt_tokens
from llama.service.fields import MOST_STOPS, Body, Fields, Ignored, Stop, Unserved
from llama.service.frames import Delta, Frames, deltas, json_line
from llama.service.openai import Usage, chat_logprobs
from llama.service.refusal import Refusal
from llama.service.shape import ANY_OBJECT, Schema
from llama.service.tools import AnswerReader, offered


def _only_off(off: float) -> AfterValidator:
    def check(value: float) -> float:
        if value != off:
            raise PydanticCustomError("unsupported_parameter", f"this is not served: give {off} or leave it out")
        return value

    return AfterValidator(check)


class OllamaOptions(Fields):
    """Ollama's `options`: how to sample. What says how a model is to be loaded comes too late here, and is ignored."""

    num_predict: int | None = Field(None, description="The most tokens of an answer; below 0: as many as fit.")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Annotated[int, _only_off(0)] = 0
    tfs_z: Annotated[float, _only_off(1.0)] = 1.0
    typical_p: Annotated[float, _only_off(1.0)] = 1.0
    mirostat_tau: Ignored = None
    mirostat_eta: Ignored = None
    penalize_newline: Ignored = None
    repeat_last_n: Ignored = None
    num_keep: Ignored = None
    num_ctx: Ignored = None
    num_batch: Ignored = None
    num_gpu: Ignored = None
    main_gpu: Ignored = None
    num_thread: Ignored = None
    numa: Ignored = None
    low_vram: Ignored = None
    f16_kv: Ignored = None
    use_mmap: Ignored = None
    use_mlock: Ignored = None
    vocab_only: Ignored = None
    logits_all: Ignored = None
    embedding_only: Ignored = None

    def params(self, logprobs: int | None) -> SamplingParams:
        own = {
            "max_tokens": None if (self.num_predict or 0) < 0 else self.num_predict,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logprobs": logprobs,
        }
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop")
        return SamplingParams(**own, **{name: getattr(self, name) for name in names})


class OllamaBody(Body):
    stream: bool = True
    options: OllamaOptions = OllamaOptions()
    format: Literal["", "json"] | Schema = ""
    think: bool | str | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    keep_alive: Ignored = None

    def sampling(self, llm: Llama) -> SamplingParams:
        params = self.options.params(self.top_logprobs if self.logprobs else None)
        schema = ANY_OBJECT if self.format == "json" else self.format or None
        return replace(params, json_schema=schema).resolve(llm.defaults)

    def word(self, name: str) -> str:
        return "format" if name == "json_schema" else name

    def tool_use(self) -> ToolUse:
        return ToolUse()

    def template_options(self) -> dict[str, Any]:
        return {} if self.think is None else {"enable_thinking": self.think is not False}


class OllamaMessage(Fields):
    role: str
    content: str = ""
    images: Unserved = None
    tool_calls: list[dict[str, Any]] = []
    tool_name: str | None = None
    thinking: Ignored = None

    def message(self) -> Message:
        message: Message = {"role": self.role, "content": self.content, "tool_calls": self.tool_calls}
        return message if self.tool_name is None else message | {"name": self.tool_name}


class OllamaChatRequest(OllamaBody):
    messages: Annotated[list[OllamaMessage], Field(max_length=MOST_MESSAGES)] = []
    tools: list[dict[str, Any]] = []

    def tool_use(self) -> ToolUse:
        """Raises Refusal."""
        return offered(self.tools)

    @staticmethod
    def said(text: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [{"function": {"name": c.name, "arguments": c.given()}} for c in calls]
        return {"message": message}


class OllamaGenerateRequest(OllamaBody):
    prompt: str = ""
    system: str | None = None
    raw: bool = Field(False, description="Continue the prompt as it is, without a chat format.")
    suffix: Unserved = None
    template: Unserved = None
    context: Unserved = None
    images: Unserved = None

    @staticmethod
    def said(text: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        return {"response": text}


class OllamaEmbedRequest(Body):
    input: str | list[str]
    truncate: bool = True
    dimensions: int | None = None
    options: OllamaOptions | None = None
    keep_alive: Ignored = None


def ollama_chat_queries(llm: Llama, body: OllamaChatRequest) -> list[Query]:
    if not body.messages:  # a client that wants the model loaded
        return []
    dialog = [message.message() for message in body.messages]
    continues = dialog[-1]["role"] == "assistant" and not dialog[-1]["tool_calls"]
    prompt = Prompt(dialog, options=body.template_options(), continues=continues)
    return [llm.chat_query(prompt, body.sampling(llm), body.tool_use())]


def ollama_generate_queries(llm: Llama, body: OllamaGenerateRequest) -> list[Query]:
    if not body.prompt:
        return []
    if body.raw:
        return [Query(llm.prompt_tokens([body.prompt])[0], body.sampling(llm))]
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    dialog = [*system, {"role": "user", "content": body.prompt}]
    return [llm.chat_query(Prompt(dialog, options=body.template_options()), body.sampling(llm))]


def ollama_embed_queries(llm: Llama, body: OllamaEmbedRequest) -> list[Query]:
    dim = llm.model.params.dim
    if body.dimensions not in (None, dim):
        raise Refusal(f"dimensions is {body.dimensions}: this model's vectors have {dim}", param="dimensions")
    most = llm.max_seq_len if body.truncate else None
    texts = prompt_tokens(llm, "input", body.input) if body.input else []
    return [Query(tokens[:most], SamplingParams().resolve(), "mean") for tokens in texts]


def ollama_embed_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    return {
        "model": call.model,
        "embeddings": unit_vectors(completions).tolist(),
        "total_duration": time.perf_counter_ns() - call.opened,
        "load_duration": 0,
        "prompt_eval_count": Usage.of(call.queries).num_prompt_tokens,
    }


def ollama_error(refusal: Refusal) -> dict[str, Any]:
    return {"error": str(refusal)}


def timestamp() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def line(call: Call, text: str, more: dict[str, Any], calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
    return {"model": call.model, "created_at": timestamp(), **call.body.said(text, calls), **more}


def piece_logprobs(logprobs: Sequence[Logprob] | None, llm: Llama) -> dict[str, Any]:
    return {"logprobs": chat_logprobs(logprobs, llm.tokenizer)["content"]} if logprobs else {}


def last_line(call: Call, text: str, completion: Completion, usage: Usage, first: int | None) -> dict[str, Any]:
    """What an answer ends with. `first`: when its first token came, where that is known."""
    end = time.perf_counter_ns()
    counts = {
        "done": True,
        "done_reason": "length" if completion.finish_reason == "length" else "stop",
        "total_duration": end - call.opened,
        "load_duration": 0,
        "prompt_eval_count": usage.num_prompt_tokens,
        "eval_count": usage.num_generated_tokens,
        "eval_duration": end - (call.opened if first is None else first),
    }
    prompt = {} if first is None else {"prompt_eval_duration": first - call.opened}
    return line(call, text, counts | prompt, completion.tool_calls or ())


def loaded_line(call: Call) -> dict[str, Any]:
    """The answer to nothing."""
    return line(call, "", {"done": True, "done_reason": "load"})


def ollama_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    if not completions:
        return loaded_line(call)
    usage = Usage.of(call.queries, completions)
    [completion] = [llm.with_tool_calls(completion, call.body.tool_use()) for completion in completions]
    whole = last_line(call, completion.text, completion, usage, None)
    return whole | piece_logprobs(completion.logprobs, llm)


class OllamaFrames(Frames):
    """A line of JSON for each piece, one for all calls of tools, and a last one with counts and durations."""

    media_type = "application/x-ndjson"
    ping = ""  # lines of JSON have no comments

    def __init__(self, llm: Llama, call: Call):
        self._llm = llm
        self._call = call
        self._usage = Usage.of(call.queries)
        self._first: int | None = None
        self._reader = AnswerReader(llm, call.body.tool_use())
        self._calls: list[AnswerPiece] = []

    def push(self, events: Sequence[Event]) -> str:
        self._first = self._first or time.perf_counter_ns()
        return "".join(map(self._lines, deltas(events)))

    def end(self) -> str:
        return "" if self._call.queries else json_line(loaded_line(self._call)) + "\n"

    def fail(self, refusal: Refusal) -> str:
        return json_line(ollama_error(refusal)) + "\n"

    def _lines(self, delta: Delta) -> str:
        self._usage.take(delta)
        lines = []
        text = self._text(delta)
        if text or delta.logprobs:
            lines.append(line(self._call, text, {"done": False} | piece_logprobs(delta.logprobs, self._llm)))
        if delta.completion is not None:
            if self._calls:
                lines.append(line(self._call, "", {"done": False}, Spoken.of(self._calls).calls))
            lines.append(last_line(self._call, "", delta.completion, self._usage, self._first))
        return "".join(json_line(one) + "\n" for one in lines)

    def _text(self, delta: Delta) -> str:
        """What is for people; calls are kept until they are whole."""
        found = self._reader.read(delta)
        self._calls += [piece for piece in found if not isinstance(piece, str)]
        return "".join(piece for piece in found if isinstance(piece, str))


OLLAMA_CHAT = Endpoint(
    OllamaChatRequest, ollama_chat_queries, ollama_response, OllamaFrames, ollama_error, "messages", needs_model=True
)
OLLAMA_GENERATE = Endpoint(
    OllamaGenerateRequest, ollama_generate_queries, ollama_response, OllamaFrames, ollama_error, needs_model=True
)
OLLAMA_EMBED = Endpoint(
    OllamaEmbedRequest, ollama_embed_queries, ollama_embed_response, None, ollama_error, "input", needs_model=True
)
