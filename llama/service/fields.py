"""What bodies are made of: fields that are known, and what becomes of the others.

A field that is null is not given. Fields that would change the answer and are not served are refused by name, and so
are unknown ones, unless the caller of `parse` says to ignore those. Each wire has its bodies in a file of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from llama.sampling_params import SAMPLING_FIELDS, SamplingParams
from llama.service.refusal import Refusal

MOST_ANSWERS = 128  # OpenAI's limit of `n`
MOST_BIASES = 1024
MOST_LORAS, MOST_SCALE = 16, 1000.0
MOST_STOPS, LONGEST_STOP = 16, 256  # each is looked for at every token

Ids = list[int]
Prompts = str | Ids | list[str] | list[Ids]


def _refuse_any(value: Any) -> Any:
    if value or (value == 0 and value is not False):
        raise PydanticCustomError("unsupported_parameter", "this is not served: leave it out")
    return value


Unserved = Annotated[Any, AfterValidator(_refuse_any)]  # clients send an empty list, or false, where they mean nothing
Ignored = Annotated[Any, Field(description="Taken and left alone: it does not change the answer.")]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any, info: ValidationInfo) -> Any:
        """Leaves out what is null, and what is unknown where the caller ignores that."""
        if not isinstance(data, dict):
            return data
        ignore_unknown = bool(info.context and info.context["ignore_unknown"])
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in data.items() if value is not None and (key in known or not ignore_unknown)}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What need not be given may be null, whatever its type."""
        found = handler(schema)
        described = handler.resolve_ref_schema(found)
        for name, known in described.get("properties", {}).items():
            if name not in described.get("required", ()) and {"type": "null"} not in known.get("anyOf", ()):
                described["properties"][name] = {"anyOf": [known, {"type": "null"}]}
        return found


class Body(Fields):
    model: str = ""

    @property
    def is_streamed(self) -> bool:
        """Whether the answer is to be sent as it comes."""
        return bool(getattr(self, "stream", False))

    def word(self, name: str) -> str:
        """The body's own word for a field of SamplingParams."""
        return name


_IN_JSON = {
    "logit_bias": Annotated[dict[str, float], Field(max_length=MOST_BIASES)],
    "json_schema": dict[str, Any] | str,
    "stop": Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)],
    "stop_token_ids": Annotated[list[int], Field(max_length=MOST_BIASES)],
}
_TYPES = {**get_type_hints(SamplingParams), **_IN_JSON}
_SAMPLING = {
    name: (_TYPES[name] | None, Field(None, description=known.help))
    for name, known in SAMPLING_FIELDS.items()
    if known.body
}


class LoraScale(Fields):
    """How strong one of a server's adapters is to be, by its number."""

    id: int
    scale: Annotated[float, Field(ge=-MOST_SCALE, le=MOST_SCALE, allow_inf_nan=False)] = 0.0


class SamplingBody(create_model("SamplingFields", __base__=Body, **_SAMPLING), ABC):
    """How to sample; the fields are those of SamplingParams."""

    repeat_penalty: float | None = Field(None, description="llama.cpp's name of repetition_penalty.")
    lora: Annotated[list[LoraScale], Field(max_length=MOST_LORAS)] | None = Field(
        None, description="llama.cpp's: adapters by their numbers in /lora-adapters, each as strong as its scale."
    )

    def params(self) -> SamplingParams:
        """Raises ValueError for what SamplingParams refuses."""
        fields = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if fields.get("n", 1) > MOST_ANSWERS:
            raise Refusal(f"n is {fields['n']}: at most {MOST_ANSWERS} answers are given to a prompt", param="n")
        if "logit_bias" in fields:
            fields["logit_bias"] = {_token_id(token): bias for token, bias in fields["logit_bias"].items()}
        if self.repeat_penalty is not None:
            fields.setdefault("repetition_penalty", self.repeat_penalty)
        fields |= self.own_params()
        if fields.get("max_tokens") == -1:  # llama.cpp's clients: as many as there is room for
            del fields["max_tokens"]
        return SamplingParams(**fields)

    @abstractmethod
    def own_params(self) -> dict[str, Any]:
        """What the endpoint has in its own way, by the names of SamplingParams."""


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: object, ignore_unknown: bool = False) -> B:
    """The body as a request of its kind. Raises Refusal in one line that names the field."""
    try:
        return kind.model_validate(body, context={"ignore_unknown": ignore_unknown})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(part if part.isprintable() else ascii(part) for part in map(str, first["loc"]))
        code = "unsupported_parameter" if first["type"] == "unsupported_parameter" else None
        raise Refusal(f"{where or 'body'}: {first['msg']}", param=where or None, code=code) from error


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise Refusal(f"logit_bias holds {text[:40]!r}: give token ids", param="logit_bias")
    return int(text)
