"""Calls in Python's way, as a grammar: whatever a model would say, its arguments keep to the tool's schema."""

import json
import random
from contextlib import suppress

import jsonschema
import pytest
from support.constrained import random_answer
from support.schemas import SCHEMAS, drawn
from support.tiny import ByteTokenizer

from llama import SamplingParams
from llama.chat.tools import TOOL_FORMATS, ToolCall, ToolUse, parse_answer
from llama.chat.tools.call_schema import rebased
from llama.constraints import ConstraintError, Constraints

FORMAT = TOOL_FORMATS["pythonic"]()
DAY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 9, "description": "Which one."},
        "day": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}], "default": None},
        "units": {"enum": ["metric", "it's", None, True, 1.5, [1, "a"], {"k": False}]},
        "when": {"$ref": "#/$defs/time"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "any": True,
    },
    "required": ["city", "when"],
    "additionalProperties": False,
    "$defs": {"time": {"type": "string", "format": "time"}},
}


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(ByteTokenizer(), 264, ByteTokenizer.stop_ids)


def tool(parameters: dict | None, name: str = "f", strict: bool = True) -> dict:
    return {"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}}


def required(parameters: dict | None, strict: bool = True) -> SamplingParams:
    return SamplingParams(grammar=ToolUse([tool(parameters, strict=strict)], "f").grammar(FORMAT))


def takes(constraints: Constraints, text: str, parameters: dict | None, strict: bool = True) -> bool:
    matcher = constraints.matcher(required(parameters, strict), ByteTokenizer.stop_ids)
    for byte in text.encode():
        if not matcher.allowed()[byte >> 3] >> (byte & 7) & 1:
            return False
        matcher.take(byte)
    return matcher.is_complete


def arguments(text: str) -> dict:
    [call] = parse_answer(FORMAT, ["f"], text).calls
    return json.loads(call.arguments)


@pytest.mark.parametrize("number", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_arguments_of_a_wild_model_are_what_their_schema_describes(constraints, number):
    chance, ended = random.Random(3), 0
    for schema in drawn(SCHEMAS, number):
        made = rebased(schema, "#/$defs/made")
        parameters = {"type": "object", "properties": {"a": made, "x y": made}, "required": ["a"]}
        parameters["$defs"] = {"made": made}
        text = random_answer(constraints, ByteTokenizer(), chance, required(parameters), limit=600)
        if text is not None:
            ended += 1
            jsonschema.validate(arguments(text), parameters)
    assert ended > 0.8 * number


def test_arguments_are_written_as_python_has_them(constraints):
    chance = random.Random(4)
    texts = [random_answer(constraints, ByteTokenizer(), chance, required(DAY), limit=600) for _ in range(40)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 30
    for text in ended:
        jsonschema.validate(arguments(text), DAY)
        assert not any(word in text for word in ("=true", "=false", "=null"))
    for text in (
        "[f(city='Oslo', when=\"12:00:00Z\")]",
        '[f(city="Oslo", day=3, when="12:00:00Z")]',
        '[f(city=\'Oslo\', day=None, units="it\'s", when="12:00:00Z", tags=[True, False])]',
        "[f(city='Oslo', units=[1, 'a'], when=\"12:00:00Z\", counts={'a': 1, \"b\": -2}, any=[{'x': None}])]",
    ):
        assert takes(constraints, text, DAY), text
        jsonschema.validate(arguments(text), DAY)
    for text in (
        "[f(city='')]",
        "[f(city='Oslo', day=10",
        "[f(city='Oslo', day=true",
        "[f(when=",
        "[f(city='Oslo', when='12:00:00Z')]",  # a format is in double quotes
        "[f(city='Oslo', when=\"25:",
        "[f(city='Oslo', when=\"12:00:00Z\", tags=[1",
        "[g(",
    ):
        assert not takes(constraints, text, DAY), text


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (None, "[f()]"),
        ({"type": "object"}, "[f(a=1, b_2='x')]"),
        ({"type": "object", "properties": {}, "additionalProperties": False}, "[f()]"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "[f(a=1)]"),
        ({"type": "object", "properties": {"from": {"const": 1}}}, "[f(from=1)]"),
        ({"type": "object", "properties": {"x-y": {"const": 1}}, "required": ["x-y"]}, "[f(**{'x-y': 1})]"),
        ({"type": "object", "properties": {"x-y": {"const": 1}}}, "[f()]"),
        ({"anyOf": [{"type": "object", "properties": {"a": {"const": True}}, "required": ["a"]}]},
         '[f(**{"a": true})]'),
        ({"type": "object", "properties": {"a": {"prefixItems": [{"type": "null"}], "type": "array"}}},
         "[f(a=[null])]"),
        ({"$ref": "#/$defs/all", "$defs": {"all": {"type": "object", "properties": {"a": {"const": 1}}}}}, "[f(a=1)]"),
        ({"type": "object", "properties": {"tree": {"$ref": "#/$defs/t"}}, "required": ["tree"],
          "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}, "[f(tree=[[], [[]]])]"),
        ({"type": "object", "properties": {"tree": {"$ref": "#/$defs/t"}},
          "$defs": {"t": {"type": "array", "prefixItems": [{"$ref": "#/$defs/t"}]}}}, "[f(tree=[[]])]"),
        ({"type": "object", "properties": {"a~/b": {"const": 1}, "c": {"$ref": "#/properties/a~0~1b"}}}, "[f(c=1)]"),
    ],
)  # fmt: skip
def test_every_kind_of_parameters_has_a_way_to_be_written(constraints, parameters, text):
    assert takes(constraints, text, parameters)
    jsonschema.validate(arguments(text), parameters or {})


@pytest.mark.parametrize(
    ("schema", "named"),
    [({"not": {}}, "not is not supported"), ({"type": "array", "contains": {}}, "contains is not supported")],
)
def test_what_cannot_be_kept_is_refused_by_its_name_or_left_out_where_the_tool_is_not_strict(
    constraints, schema, named
):
    for parameters in ({"type": "object", "properties": {"a": schema}}, schema):
        with pytest.raises(ConstraintError, match=named):
            constraints.validate(required(parameters))
        constraints.validate(required(parameters, strict=False))


@pytest.mark.parametrize(
    "broken",
    [{"type": 3}, {"type": ["string", {}]}, {"enum": 3}, {"anyOf": 3}, {"properties": 3}, {"required": 3, "type":
     "object"}, {"$ref": {}}, {"$ref": "#/nowhere"}, {"$ref": "#/properties/a"}, {"type": "string", "minLength": -1},
     {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "array", "items": [3]}, False],
)  # fmt: skip
def test_a_schema_that_is_none_is_refused_and_breaks_nothing(constraints, broken):
    for parameters in ({"type": "object", "properties": {"a": broken}, "required": ["a"]}, broken or {"type": 3}):
        for strict in (True, False):
            with suppress(ConstraintError):  # it may be one to llguidance
                constraints.validate(required(parameters, strict))


def test_what_is_written_is_what_may_be_said(constraints):
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "x y": {"type": "integer"}}}
    written = FORMAT.write([ToolCall("f", json.dumps({"a": "it's", "x y": 3}))])
    assert written == "[f(a=\"it's\", **{'x y': 3})]"
    assert takes(constraints, written, schema)
    assert arguments(written) == {"a": "it's", "x y": 3}
