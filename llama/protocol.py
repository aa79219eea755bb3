"""OpenAI's request and response bodies: what a client may ask for, and what it gets.

Unknown fields are refused, not ignored: a request that cannot be served as it is meant fails.
Source: OpenAI's API reference, /v1/chat/completions, /v1/completions, /v1/embeddings.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from llama.answer import Completion, Logprob
from llama.sampling_params import SAMPLING_FIELDS, SamplingParams
from llama.tokenizer import Tokenizer

Prompts = str | list[int] | list[str] | list[list[int]]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    # taken and left alone: they do not change the answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None


_IN_JSON = {"logit_bias": dict[str, float], "stop": str | list[str], "stop_token_ids": list[int]}
_TYPES = {**get_type_hints(SamplingParams), **_IN_JSON}
_SAMPLING = {
    name: (_TYPES[name] | None, Field(None, description=known.help))
    for name, known in SAMPLING_FIELDS.items()
    if known.body
}


class SamplingBody(create_model("SamplingFields", __base__=Body, **_SAMPLING), ABC):
    """How to sample; the fields are those of SamplingParams."""

    def params(self) -> SamplingParams:
        """Raises ValueError for what SamplingParams refuses."""
        fields = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        for token in fields.get("logit_bias", ()):
            if not token.isdecimal():
                raise ValueError(f"logit_bias holds {token!r}: give token ids")
        if "logit_bias" in fields:
            fields["logit_bias"] = {int(token): value for token, value in fields["logit_bias"].items()}
        return SamplingParams(**fields, **self.logprob_fields())

    @abstractmethod
    def logprob_fields(self) -> dict[str, Any]:
        """What the endpoint's own way of asking for logprobs means."""


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str


class ChatRequest(SamplingBody):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int = 0

    def logprob_fields(self) -> dict[str, Any]:
        return {"logprobs": self.top_logprobs if self.logprobs else None}

    def params(self) -> SamplingParams:
        if self.max_completion_tokens is not None:
            return self.model_copy(
                update={"max_tokens": self.max_completion_tokens, "max_completion_tokens": None}
            ).params()
        return super().params()


class CompletionRequest(SamplingBody):
    prompt: Prompts
    logprobs: int | None = None
    echo: bool = False

    def logprob_fields(self) -> dict[str, Any]:
        return {
            "logprobs": self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
            "echo": self.echo,
        }


class EmbeddingRequest(Body):
    input: Prompts
    encoding_format: Literal["float"] = "float"


def parse(kind: type[Body], body: object) -> Body:
    """The body as a request of its kind. Raises ValueError in one line that names the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise ValueError(f"{where}: {first['msg']}") from error


def prompts_of(value: Prompts) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        return [value]
    return list(value)


def usage(num_prompt_tokens: int, num_generated_tokens: int = 0) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
    }


def chat_response(
    request: ChatRequest, completions: Sequence[Completion], num_prompt_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": _chat_logprobs(completion, tokenizer),
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(completions)
    ]
    counts = usage(num_prompt_tokens, sum(len(completion.tokens) for completion in completions))
    return {**_head("chatcmpl", "chat.completion", request), "choices": choices, "usage": counts}


def completion_response(
    request: CompletionRequest,
    completions: Sequence[Completion],
    num_prompt_tokens: int,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": completion.text,
            "logprobs": _text_logprobs(completion, tokenizer),
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(completions)
    ]
    num_tokens = sum(len(completion.tokens) for completion in completions)
    num_echoed = num_prompt_tokens * (request.n or 1) if request.echo else 0
    counts = usage(num_prompt_tokens, num_tokens - num_echoed)
    return {**_head("cmpl", "text_completion", request), "choices": choices, "usage": counts}


def embedding_response(
    request: EmbeddingRequest, vectors: Sequence[Sequence[float]], num_prompt_tokens: int
) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": list(vector)}
        for index, vector in enumerate(vectors)
    ]
    counts = {"prompt_tokens": num_prompt_tokens, "total_tokens": num_prompt_tokens}
    return {"object": "list", "model": request.model, "data": data, "usage": counts}


def _head(prefix: str, kind: str, request: Body) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
    }


def _chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

    return {
        "content": [
            {**entry(item.token, item.logprob), "top_logprobs": [entry(*pair) for pair in item.top]}
            for item in completion.logprobs
        ]
    }


def _text_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    entries: list[Logprob | None] = [*(completion.prompt_logprobs or ()), *completion.logprobs]
    texts = [tokenizer.token_bytes(token).decode(errors="replace") for token in completion.tokens]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [entry and entry.logprob for entry in entries],
        "top_logprobs": [
            entry and {tokenizer.token_bytes(t).decode(errors="replace"): value for t, value in entry.top}
            for entry in entries
        ],
        "text_offset": offsets[:-1],
    }
