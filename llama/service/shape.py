"""What an answer has to look like, in every spelling that is in use: OpenAI's, vLLM's and llama.cpp's.

Sources: OpenAI's API reference, "Structured model outputs"; vLLM's "Structured outputs" and its older guided_*; the
README of llama.cpp's server; Ollama's docs/api.md.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from llama.service.fields import Fields, Ignored, SamplingBody
from llama.service.refusal import Refusal

ANY_OBJECT: dict[str, Any] = {"type": "object"}
MOST_CHOICES = 1024  # to choose among

Schema = dict[str, Any]
SchemaOrText = Schema | str
Choices = Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]


class Given(NamedTuple):
    """What a client asks for: in its own word, and as a field of SamplingParams."""

    word: str
    name: str
    value: Any


class NamedSchema(Fields):
    """OpenAI's description of a schema. Only where `strict` is true are keywords refused that cannot be kept."""

    name: Ignored = None
    description: Ignored = None
    strict: bool = False
    schema_: Schema | None = Field(None, alias="schema")


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Schema | None = Field(None, alias="schema", description="llama.cpp's place for a schema.")

    def given(self) -> list[Given]:
        return [Given("response_format", "json_schema", self.wanted())]

    def wanted(self) -> Schema | None:
        if self.type == "text":
            return None
        if self.schema_ is not None or self.type == "json_object":
            return self.schema_ or ANY_OBJECT
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise Refusal("response_format.json_schema.schema is missing: give the schema", param="response_format")
        schema = self.json_schema.schema_
        return schema if self.json_schema.strict else lenient(schema)


class StructuredOutputs(Fields):
    """vLLM's spelling."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_fallback: Ignored = None
    disable_any_whitespace: Ignored = None
    disable_additional_properties: Ignored = None
    whitespace_pattern: Ignored = None

    def given(self) -> list[Given]:
        word = "structured_outputs"
        return [
            Given(word, "json_schema", ANY_OBJECT if self.json_object else self.json_),
            Given(word, "regex", self.regex),
            Given(word, "grammar", one_of(self.choice)),
            Given(word, "grammar", self.grammar),
        ]


class ShapedBody(SamplingBody):
    """How to sample, and what the answer has to look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: Ignored = None
    guided_whitespace_pattern: Ignored = None

    def given(self) -> list[Given]:
        """Every shape that is asked for, of which there may be one."""
        found = [
            Given("json_schema", "json_schema", self.json_schema),
            Given("regex", "regex", self.regex),
            Given("grammar", "grammar", self.grammar),
            Given("guided_json", "json_schema", self.guided_json),
            Given("guided_regex", "regex", self.guided_regex),
            Given("guided_choice", "grammar", one_of(self.guided_choice)),
            Given("guided_grammar", "grammar", self.guided_grammar),
        ]
        found += self.response_format.given() if self.response_format else ()
        found += self.structured_outputs.given() if self.structured_outputs else ()
        return [one for one in found if one.value is not None]

    def own_params(self) -> dict[str, Any]:
        given = self.given()
        if len(given) > 1:
            first, second = given[:2]
            raise Refusal(f"{second.word} is given beside {first.word}: give one of them", param=second.word)
        return {one.name: one.value for one in given}

    def word(self, name: str) -> str:
        return next((one.word for one in self.given() if one.name == name), name)


def one_of(options: list[str] | None) -> str | None:
    """The grammar, in Lark, of one of these texts."""
    return options and "start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in options)


def lenient(schema: Schema) -> Schema:
    """The same, of which llguidance leaves out what it cannot keep."""
    return {**schema, "x-guidance": {"lenient": True}}
