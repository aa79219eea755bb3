"""What describes a call of a tool, for the formats that write it in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Tool = Mapping[str, Any]  # a description of a function, as OpenAI's API has it
GUIDANCE = {"whitespace_pattern": r"\n?[ ]{0,16}"}  # of llguidance: room to indent, and none to go on for ever


def call_schema(tools: Sequence[Tool], key: str) -> dict[str, Any]:
    """What describes a call of one of the tools, its name first. References within parameters stay within them."""
    definitions = {
        f"tool{number}": rebased(tool["function"].get("parameters") or {"type": "object"}, f"#/$defs/tool{number}")
        for number, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, key: {"$ref": f"#/$defs/tool{number}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    return {"anyOf": calls, "$defs": definitions}


def calls_or_json(calls: str, schema: Mapping[str, Any]) -> str:
    """The grammar, in Lark, of what this one describes, calls and nothing else, or of JSON that a schema does."""
    own = schema.get("x-guidance")
    guided = {**schema, "x-guidance": {**(own if isinstance(own, Mapping) else {}), **GUIDANCE}}
    named = calls.replace("start:", "called:", 1)
    return f"start: called | said\n{named}\nsaid: %json {json.dumps(guided)}"


def rebased(schema: Any, root: str) -> Any:
    """A schema whose references start at another root."""
    if isinstance(schema, Mapping):
        return {
            name: root + value[1:]
            if name == "$ref" and isinstance(value, str) and value[:1] == "#"
            else rebased(value, root)
            for name, value in schema.items()
        }
    return [rebased(item, root) for item in schema] if isinstance(schema, list) else schema


def is_nested_within(value: Any, depth: int) -> bool:
    """Whether there are at most so many brackets around anything in a tree of JSON; it is read no deeper."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return not items or (depth > 0 and all(is_nested_within(item, depth - 1) for item in items))
