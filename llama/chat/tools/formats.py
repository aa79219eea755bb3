"""How models write calls of tools: one class a format, which reads them, constrains them and asks for them.

Sources: Meta's prompt formats of Llama 3.1 and 3.2 (llama-models); the chat templates of Hermes, Qwen and Mistral;
SmolLM2's model card; mistral-common.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llama.chat.tools.call_schema import GUIDANCE, Tool, call_schema
from llama.chat.tools.python_grammar import is_argument_name, python_calls
from llama.chat.tools.scanning import (
    NoCall,
    Reader,
    Sink,
    after_blank,
    json_array,
    json_call,
    json_calls,
    literal,
    named_call,
    python_array,
    python_call,
    until,
)
from llama.tool_call import ToolCall

ANY_TEXT = "TEXT: /(.|\\n)*/"


class ToolFormat(ABC):
    """One way to write calls. `marks` open them; without a mark, one of the characters `bare` does at the beginning.

    A new format is a subclass with `read`, `required`, `optional` and `write`, and a row in TOOL_FORMATS.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[str] = ""
    id_length: ClassVar[int | None] = None  # of a call's id, in letters and digits; None: as OpenAI's
    key: ClassVar[str] = "arguments"  # of a call's arguments

    def __init__(self, controls: Mapping[str, int] = {}) -> None:
        """`controls` are the vocabulary's control tokens, by their texts: marks may be among them."""
        self.controls = {controls[mark]: mark for mark in self._all_marks() if mark in controls}
        self._ids = {mark: id for id, mark in self.controls.items()}

    @abstractmethod
    def read(self, mark: str, sink: Sink) -> Reader:
        """Reads what follows a mark; with "" for a mark, from the very first character on."""

    @abstractmethod
    def required(self, tools: Sequence[Tool], parallel: bool) -> str:
        """The grammar, in Lark, of one call or, with `parallel`, of several, and nothing else."""

    @abstractmethod
    def optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        """The grammar, in Lark, of text and calls, of which there need not be any."""

    @abstractmethod
    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them, for a dialog that goes on."""

    def instructions(self, tools: Sequence[Tool]) -> str:
        """What a system message says where the model's own template does not name the tools."""
        described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        return (
            "You may call functions to help with what the user asks. These are their descriptions:\n"
            f"<tools>\n{described}\n</tools>\n\n"
            f"To call functions, answer in this form and with nothing else:\n{self.write([EXAMPLE])}"
        )

    def result(self, content: str) -> str:
        """What a tool returned, as it is told where the model's own template does not take it."""
        return f"<tool_response>\n{content}\n</tool_response>"

    def _all_marks(self) -> tuple[str, ...]:
        """Texts that a vocabulary may have as control tokens."""
        return self.marks

    def _lark(self, mark: str) -> str:
        return f"<[{self._ids[mark]}]>" if mark in self._ids else json.dumps(mark)

    def _objects(self, calls: Sequence[ToolCall]) -> list[str]:
        return [f'{{"name": {json.dumps(c.name)}, "{self.key}": {c.arguments or "{}"}}}' for c in calls]

    def _calls_json(self, tools: Sequence[Tool], parallel: bool | None) -> str:
        """The schema, in Lark, of a call, or with `parallel` given of an array of calls."""
        schema = call_schema(tools, self.key)
        if parallel is not None:
            most = {} if parallel else {"maxItems": 1}
            schema = {"type": "array", "items": schema, "minItems": 1, **most, "$defs": schema.pop("$defs")}
        is_strict = any(tool["function"].get("strict") for tool in tools)
        schema["x-guidance"] = GUIDANCE if is_strict else {**GUIDANCE, "lenient": True}
        return f"%json {json.dumps(schema)}"


EXAMPLE = ToolCall("function_name", '{"argument": "value"}')


class HermesTools(ToolFormat):
    """Hermes 2 and 3, Qwen 2.5, and whoever knows none: a tagged object a call."""

    name = "hermes"
    marks = ("<tool_call>",)

    def read(self, mark: str, sink: Sink) -> Reader:
        yield from json_calls(sink)
        yield from literal("</tool_call>", (yield from after_blank()))

    def required(self, tools: Sequence[Tool], parallel: bool) -> str:
        more = ' ("\\n" call)*' if parallel else ""
        return f"start: call{more}\n{self._call(tools)}"

    def optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        if self.marks[0] in self._ids:
            return f"start: TEXT (call TEXT){'*' if parallel else '?'}\n{self._call(tools)}\n{ANY_TEXT}"
        call = self._call(tools).replace(self._lark("<tool_call>") + " ", "", 1)
        start = "(head call)* TEXT" if parallel else "TEXT | head call"  # text behind the one call might hold another
        return f'start: {start}\nhead[lazy]: TEXT "<tool_call>"\n{call}\n{ANY_TEXT}'

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in self._objects(calls))

    def _call(self, tools: Sequence[Tool]) -> str:
        opened, closed = self._lark("<tool_call>"), self._lark("</tool_call>")
        return f'call: {opened} "\\n" body "\\n" {closed}\nbody: {self._calls_json(tools, None)}'

    def _all_marks(self) -> tuple[str, ...]:
        return ("<tool_call>", "</tool_call>")


class SmolLM2Tools(HermesTools):
    """SmolLM2: an array of calls in one tag."""

    name = "smollm2"

    def required(self, tools: Sequence[Tool], parallel: bool) -> str:
        return f"start: call\n{self._call(tools, parallel)}"

    def optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        if self.marks[0] in self._ids:
            return f"start: TEXT call?\n{self._call(tools, parallel)}\n{ANY_TEXT}"
        call = self._call(tools, parallel).replace(self._lark("<tool_call>") + " ", "", 1)
        return f'start: TEXT | head call\nhead[lazy]: TEXT "<tool_call>"\n{call}\n{ANY_TEXT}'

    def write(self, calls: Sequence[ToolCall]) -> str:
        return f"<tool_call>[{', '.join(self._objects(calls))}]</tool_call>"

    def _call(self, tools: Sequence[Tool], parallel: bool = False) -> str:
        opened, closed = self._lark("<tool_call>"), self._lark("</tool_call>")
        return f"call: {opened} body {closed}\nbody: {self._calls_json(tools, parallel)}"


class Llama3Tools(ToolFormat):
    """Llama 3.1: an object as the answer, or behind <|python_tag|>; lists and <function=...> are read too."""

    name = "llama3"
    marks = ("<|python_tag|>", "<function=")
    bare = "{["
    key = "parameters"

    def read(self, mark: str, sink: Sink) -> Reader:
        if mark == "<function=":
            yield from named_call(sink, (yield from until(">")))
            return (yield from literal("</function>", (yield from after_blank())))
        char = yield from after_blank()
        if char == "[":
            char = yield from after_blank()
            return (yield from (json_array if char in "{]" else python_array)(sink, char))
        if char != "{":  # name.call(...), of a tool that the model was trained with
            return (yield from python_call(sink, (yield from until(".call(", char))))
        while char == "{":
            yield from json_call(sink)
            char = yield from after_blank()
            if char in ";,":
                char = yield from after_blank()
        raise NoCall

    def required(self, tools: Sequence[Tool], parallel: bool) -> str:
        more = ' ("; " call)*' if parallel else ""
        return f"start: call{more}\ncall: {self._calls_json(tools, None)}"

    def optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        more = ' ("; " call)*' if parallel else ""
        return f"start: TEXT | call{more}\nTEXT: /([^{{](.|\\n)*)?/\ncall: {self._calls_json(tools, None)}"

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(self._objects(calls))

    def result(self, content: str) -> str:
        return content


class PythonicTools(ToolFormat):
    """Llama 3.2's small models: a list of Python's calls."""

    name = "pythonic"
    marks = ("<|python_tag|>",)
    bare = "["

    def read(self, mark: str, sink: Sink) -> Reader:
        if (yield from after_blank()) != "[":
            raise NoCall
        yield from python_array(sink, (yield from after_blank()))

    def required(self, tools: Sequence[Tool], parallel: bool) -> str:
        return self._grammar("start: calls", tools, parallel)

    def optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        return self._grammar("start: TEXT | calls\nTEXT: /([^\\[](.|\\n)*)?/", tools, parallel)

    def write(self, calls: Sequence[ToolCall]) -> str:
        written = []
        for call in calls:
            arguments = json.loads(call.arguments or "{}")
            written.append(f"{call.name}({', '.join(python_arguments(arguments))})")
        return f"[{', '.join(written)}]"

    def _grammar(self, start: str, tools: Sequence[Tool], parallel: bool) -> str:
        more = ' (", " call)*' if parallel else ""
        return f'{start}\ncalls: "[" call{more} "]"\n{python_calls(tools)}'


def python_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments in a call; those whose names cannot stand there are in a dict."""
    written = [f"{name}={value!r}" for name, value in arguments.items() if is_argument_name(name)]
    others = {name: value for name, value in arguments.items() if not is_argument_name(name)}
    return written + [f"**{others!r}"] * bool(others)


class MistralTools(ToolFormat):
    """Mistral: [TOOL_CALLS] and an array; since v11 a name, [ARGS] and the arguments, for each call."""

    name = "mistral"
    marks = ("[TOOL_CALLS]",)
    id_length = 9

    def read(self, mark: str, sink: Sink) -> Reader:
        char = yield from after_blank()
        if char == "[":
            yield from json_array(sink, (yield from after_blank()))
        else:
            yield from named_call(sink, (yield from until("[ARGS]", char)))

    def required(self, tools: Sequence[Tool], parallel: bool) -> str:
        return f"start: calls\n{self._calls(tools, parallel)}"

    def optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        calls = self._calls(tools, parallel)
        if self.marks[0] in self._ids:
            return f"start: TEXT calls?\n{calls}\n{ANY_TEXT}"
        calls = calls.replace(self._lark("[TOOL_CALLS]") + " ", "", 1)
        return f'start: TEXT | head calls\nhead[lazy]: TEXT "[TOOL_CALLS]"\n{calls}\n{ANY_TEXT}'

    def write(self, calls: Sequence[ToolCall]) -> str:
        return f"[TOOL_CALLS] [{', '.join(self._objects(calls))}]"

    def _calls(self, tools: Sequence[Tool], parallel: bool) -> str:
        return f'calls: {self._lark("[TOOL_CALLS]")} " "? body\nbody: {self._calls_json(tools, parallel)}'

    def _all_marks(self) -> tuple[str, ...]:
        return ("[TOOL_CALLS]", "[ARGS]")


TOOL_FORMATS: dict[str, type[ToolFormat]] = {
    kind.name: kind for kind in (HermesTools, SmolLM2Tools, Llama3Tools, PythonicTools, MistralTools)
}


def choose_tool_format(template: str | None, controls: Mapping[str, int], name: str | None = None) -> ToolFormat:
    """The format that a model's template writes, else that whose control tokens there are, else Hermes'."""
    text = template or ""
    if name is None:
        is_written = {
            "smollm2": "named SmolLM" in text,
            "mistral": "[TOOL_CALLS]" in text,
            "hermes": "<tool_call>" in text,
        }
        is_written |= {"llama3": "<|python_tag|>" in text or "ipython" in text}
        is_known = {"mistral": "[TOOL_CALLS]" in controls, "llama3": "<|python_tag|>" in controls}
        name = next((name for name, found in (*is_written.items(), *is_known.items()) if found), "hermes")
    if name not in TOOL_FORMATS:
        raise ValueError(f"unknown tool format {name!r}: give one of {', '.join(TOOL_FORMATS)}")
    return TOOL_FORMATS[name](controls)
