"""What Python's calls may look like, as a grammar in Lark: name(key=literal, ...), with the values of JSON schemas.

Structure, constants and plain strings are written as Python has them. Numbers, and strings with a pattern or a format,
look alike in both languages: llguidance's JSON describes them, and with it any value whose schema says what is not
written here. Readers take an argument in JSON, too. What no text is made for stays within its schema: names beside the
listed ones are left out, although a schema allows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from llama.chat.tools.call_schema import GUIDANCE, Tool, rebased

ESCAPES = {"json_allowed_escapes": 'bfnrt"\\'}  # those of JSON that mean the same in Python
DESCRIBING = {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
              "deprecated", "readOnly", "writeOnly"}  # fmt: skip
NUMERIC = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": NUMERIC,
    "number": NUMERIC,
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "boolean": set(),
    "null": set(),
}
ANYTHING = """
anything: TEXT_LITERAL | NUMBER_LITERAL | "True" | "False" | "None" | list_literal | dict_literal
list_literal: "[" (anything (", " anything)*)? "]"
dict_literal: "{" (TEXT_LITERAL ": " anything (", " TEXT_LITERAL ": " anything)*)? "}"
TEXT_LITERAL: /'([^'\\\\\\x00-\\x1f]|\\\\['\\\\n])*'/ | /"([^"\\\\\\x00-\\x1f]|\\\\["\\\\n])*"/
NUMBER_LITERAL: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?/
NAME_LITERAL: /[A-Za-z_][A-Za-z_0-9]{0,63}/"""


class NotInPython(Exception):
    """A schema that is not written here."""


class Rules:
    """Rules under names that begin alike; what says the same is one rule."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._says: dict[str, str] = {}  # by name
        self._names: dict[str, str] = {}  # by what they say

    def add(self, says: str) -> str:
        """The name of a rule that says this."""
        if says not in self._names:
            self._names[says] = self.promise()
            self.keep(self._names[says], says)
        return self._names[says]

    def promise(self) -> str:
        """The name of a rule that is still to be kept."""
        name = f"{self._prefix}_{len(self._says)}"
        self._says[name] = ""
        return name

    def keep(self, name: str, says: str) -> None:
        self._says[name] = says

    def drop_from(self, size: int) -> None:
        """Forgets all rules but the first so many."""
        self._says = dict(list(self._says.items())[:size])
        self._names = {says: name for says, name in self._names.items() if name in self._says}

    def __len__(self) -> int:
        return len(self._says)

    def __contains__(self, name: str) -> bool:
        return name in self._says

    def lines(self) -> list[str]:
        return [f"{name}: {says}" for name, says in self._says.items()]


class PythonValues:
    """The rules of values; each method tells a rule's name, or what one may say. They raise NotInPython.

    root: the whole schema, in which references are found.
    """

    def __init__(self, rules: Rules, root: Any, is_strict: bool) -> None:
        self._rules = rules
        self._root = root
        self._guidance = GUIDANCE | ESCAPES | ({} if is_strict else {"lenient": True})
        self._referred: dict[str, str] = {}  # the rules of what schemas refer to, by its places

    def value(self, schema: Any) -> str:
        keys = set() if schema is True else mapping(schema).keys() - DESCRIBING
        if not keys:
            return "anything"
        if keys == {"$ref"}:
            return self._reference(schema["$ref"])
        if keys == {"anyOf"} or (keys == {"allOf"} and len(list_of(schema["allOf"])) == 1):
            [parts] = (list_of(schema[key]) for key in keys)
            return self._rules.add(" | ".join(map(self.value, parts)))
        types = texts([schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", []))
        if keys - {"type"} in ({"enum"}, {"const"}):
            return self._constants(list_of(schema.get("enum", [schema.get("const")])), types)
        if not types or keys - {"type"} - set().union(*(KEYWORDS.get(one, ()) for one in types)):
            raise NotInPython
        return self._rules.add(" | ".join(self._typed(one, schema) for one in types))

    def pairs(self, schema: Mapping[str, Any], pair: Callable[[str | None, Any], str]) -> str:
        """An object's members, each made by `pair` of its name and schema: those that are needed and any of the others.

        They come in the schema's order. Where the schema names none, there may be any, whose name is None.
        """
        if schema.keys() - DESCRIBING - {"type"} - KEYWORDS["object"] or schema.get("type", "object") != "object":
            raise NotInPython
        properties, others = mapping(schema.get("properties", {})), schema.get("additionalProperties", True)
        required = texts(schema.get("required", []))
        if not properties and not required:
            return '""' if others is False else self._several(pair(None, others), 0, None)
        if not set(required) <= properties.keys():
            raise NotInPython
        following = first = '""'
        for name, described in reversed(properties.items()):
            one = pair(name, described)
            if name in required:
                following, first = self._rules.add(f'", " {one} {following}'), self._rules.add(f"{one} {following}")
            else:
                first = self._rules.add(f"{one} {following} | {first}")
                following = self._rules.add(f'(", " {one})? {following}')
        return first

    def in_json(self, schema: Any) -> str:
        """A value as JSON has it, whatever its schema says."""
        root = "#/$defs/root"
        parts = rebased(schema, root) if isinstance(schema, Mapping) else {"allOf": [schema]}
        if is_referring(schema):
            parts["$defs"] = {"root": rebased(self._root, root)}
        return self._rules.add(f"%json {json.dumps({**parts, 'x-guidance': self._guidance})}")

    def in_python_or_json(self, schema: Any) -> str:
        size = len(self._rules)
        try:
            return self.value(schema)
        except NotInPython:
            self._rules.drop_from(size)
            self._referred = {place: name for place, name in self._referred.items() if name in self._rules}
            return self.in_json(schema)

    def found(self, place: Any) -> Any:
        """What stands at a JSON pointer."""
        if not isinstance(place, str) or place[:1] != "#":
            raise NotInPython
        found = self._root
        for part in unquote(place[1:]).split("/")[1:]:
            found = mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
        return found

    def _reference(self, place: Any) -> str:
        found = self.found(place)
        if place not in self._referred:
            self._referred[place] = self._rules.promise()
            self._rules.keep(self._referred[place], self.value(found))
        return self._referred[place]

    def _constants(self, values: Sequence[Any], types: Sequence[str]) -> str:
        written = [python_text(value) for value in values if not types or types_of(value) & set(types)]
        if not written:
            raise NotInPython
        return self._rules.add(" | ".join(written))

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        own = {name: schema[name] for name in KEYWORDS.get(kind, ()) if name in schema}
        match kind:
            case "null":
                return '"None"'
            case "boolean":
                return '"True" | "False"'
            case "array":
                return self._array(own)
            case "object":
                return self._rules.add(f'"{{" {self.pairs(own, self._item)} "}}"')
            case "string" if not own.keys() & {"pattern", "format"}:
                return self._string(bound_of(own, "minLength", 0), bound_of(own, "maxLength"))
            case "string" | "integer" | "number":
                return self.in_json({"type": kind, **own})
        raise NotInPython

    def _item(self, name: str | None, schema: Any) -> str:
        return self._rules.add(f'{"TEXT_LITERAL" if name is None else python_text(name)} ": " {self.value(schema)}')

    def _string(self, least: int, most: int | None) -> str:
        if most is not None and most < max(least, 1):
            raise NotInPython
        times = f"{{{least},{'' if most is None else most}}}"
        return self._rules.add(" | ".join(f"/{q}([^{q}\\\\\\x00-\\x1f]|\\\\[{q}\\\\n]){times}{q}/" for q in "'\""))

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self.value(schema.get("items", True))
        least, most = bound_of(schema, "minItems", 0), bound_of(schema, "maxItems")
        return self._rules.add(f'"[" {self._several(item, least, most)} "]"')

    def _several(self, item: str, least: int, most: int | None) -> str:
        """So many, with commas between them."""
        if most is not None and most < max(least, 1):
            raise NotInPython
        more = f'(", " {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}' if most != 1 else ""
        return self._rules.add(f"({item} {more})" + "?" * (least == 0))


class PythonCall:
    """The rules of one tool's calls, of which `name` is the call's own. Other tools' have other `prefix`es.

    An argument whose name cannot be one in Python stands in a dict behind `**`, and so do all where the parameters are
    more than a list of them.
    """

    def __init__(self, function: Mapping[str, Any], prefix: str) -> None:
        root = function.get("parameters") or {"type": "object", "additionalProperties": False}
        self._rules = Rules(prefix)
        self._values = PythonValues(self._rules, root, bool(function.get("strict")))
        try:
            arguments = self._values.pairs(self._parameters(root), self._argument)
        except NotInPython:
            arguments = self._rules.add(f'"**" {self._values.in_json(root)}')
        self.name = self._rules.add(f'{in_lark(function["name"] + "(")} {arguments} ")"')

    def lines(self) -> list[str]:
        return self._rules.lines()

    def _parameters(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if schema.keys() - DESCRIBING == {"$ref"}:
            schema = mapping(self._values.found(schema["$ref"]))
        properties, required = dict(mapping(schema.get("properties", {}))), texts(schema.get("required", []))
        odd = {name: properties.pop(name) for name in list(properties) if not is_argument_name(name)}
        if not odd:
            return schema
        needed = [name for name in required if name in odd]
        rest = {"type": "object", "properties": odd, "required": needed, "additionalProperties": False}
        required = [name for name in required if name not in odd] + ["**"] * bool(needed)
        return {**schema, "properties": {**properties, "**": rest}, "required": required}

    def _argument(self, name: str | None, schema: Any) -> str:
        value = self._values.in_python_or_json(schema)
        if name == "**":
            return self._rules.add(f'"**" {value}')
        return self._rules.add(f'{"NAME_LITERAL" if name is None else in_lark(name)} "=" {value}')


def python_calls(tools: Sequence[Tool]) -> str:
    """The rule `call` of any of the tools' calls, and all rules below it."""
    calls = [PythonCall(tool["function"], f"tool{number}") for number, tool in enumerate(tools)]
    rules = [line for call in calls for line in call.lines()]
    return "\n".join([f"call: {' | '.join(call.name for call in calls)}", *rules]) + ANYTHING


def is_argument_name(name: str) -> bool:
    return (name.isidentifier() and name.replace("_", "").isalnum()) or set(name) == {"_"}


def is_referring(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        return "$ref" in schema or any(map(is_referring, schema.values()))
    return isinstance(schema, list) and any(map(is_referring, schema))


def bound_of(schema: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    found = schema.get(name, default)
    if found is not default and (not isinstance(found, int) or found < 0):
        raise NotInPython
    return found


def mapping(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise NotInPython
    return given


def list_of(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise NotInPython
    return given


def texts(given: Any) -> list[str]:
    if not all(isinstance(one, str) for one in list_of(given)):
        raise NotInPython
    return given


def types_of(value: Any) -> set[str]:
    """JSON's names of what a value is."""
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"} | ({"integer"} if value.is_integer() else set())
        case str():
            return {"string"}
    return {"array"} if isinstance(value, list) else {"object"}


def in_lark(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def python_text(value: Any) -> str:
    """A value as Python writes it, in Lark; a text in either quote where it needs no escaping."""
    written = repr(value)
    if isinstance(value, str) and written == f"'{value}'" and '"' not in value:
        double = f'"{value}"'
        return f"({in_lark(written)} | {in_lark(double)})"
    return in_lark(written)
