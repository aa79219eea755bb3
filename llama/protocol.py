"""OpenAI's request bodies: what a client may ask for.

Fields that would change the answer and are not known are refused, not ignored; a field that is null is not given.
Source: OpenAI's API reference, /v1/chat/completions, /v1/completions, /v1/embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from llama.sampling_params import SAMPLING_FIELDS, SamplingParams

MOST_ANSWERS = 128  # OpenAI's limit of `n`
Prompts = str | list[int] | list[str] | list[list[int]]


def _refuse_any(value: list[Any]) -> list[Any]:
    if value:
        raise ValueError("this is not served: leave it out")
    return value


Unserved = Annotated[list[Any], AfterValidator(_refuse_any)]  # clients send an empty list where they mean nothing


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class Body(Fields):
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

    stream: Literal[False] = False

    def params(self) -> SamplingParams:
        """Raises ValueError for what SamplingParams refuses."""
        fields = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if fields.get("n", 1) > MOST_ANSWERS:
            raise ValueError(f"n is {fields['n']}: at most {MOST_ANSWERS} answers are given to a prompt")
        if "logit_bias" in fields:
            fields["logit_bias"] = {_token_id(token): bias for token, bias in fields["logit_bias"].items()}
        return SamplingParams(**(fields | self.own_params()))

    @abstractmethod
    def own_params(self) -> dict[str, Any]:
        """What the endpoint has in its own way, by the names of SamplingParams."""


class ResponseFormat(Fields):
    type: Literal["text"]


class ChatMessage(Fields):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None  # taken and left alone, as no chat format has a place for it
    annotations: Unserved = []
    tool_calls: Unserved = []


class ChatRequest(SamplingBody):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: ResponseFormat | None = None
    tools: Unserved = []
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def own_params(self) -> dict[str, Any]:
        own: dict[str, Any] = {"logprobs": self.top_logprobs if self.logprobs else None}
        if self.max_completion_tokens is not None:
            own["max_tokens"] = self.max_completion_tokens
        return own


class CompletionRequest(SamplingBody):
    prompt: Prompts
    logprobs: int | None = None
    echo: bool = False

    def own_params(self) -> dict[str, Any]:
        return {
            "logprobs": self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
            "echo": self.echo,
        }


class EmbeddingRequest(Body):
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"  # base64: of float32, little-endian


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: object) -> B:
    """The body as a request of its kind. Raises ValueError in one line that names the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise ValueError(f"{where}: {first['msg']}") from error


def _token_id(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"logit_bias holds {text!r}: give token ids")
    return int(text)
