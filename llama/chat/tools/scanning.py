"""Reading calls character by character: each reader is a coroutine that is sent one character after the other.

A reader calls `begin` when it knows a call's name, `more` with each piece of its arguments, and `finish` behind it.
Until `begin` nothing has been shown of what was read, and `NoCall` gives it back as text; from then on arguments are
passed on as they are written, balanced or not.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Generator
from typing import Any, Protocol

Reader = Generator[None, str, Any]  # what it returns depends on the reader

ARGUMENTS = ("arguments", "parameters")
BLANK = " \t\r\n"
FILE = "<tool call>"  # what Python takes a model's text to be

# Python warns on standard error of what only looks like a number; nobody who serves a model can do anything about it.
warnings.filterwarnings("ignore", module=FILE)


class NoCall(Exception):
    """What was read is no call."""


class Sink(Protocol):
    """Who is told what a reader finds."""

    def begin(self, name: str) -> None:
        """A call has begun. Raises NoCall where nobody has a tool of this name."""

    def more(self, arguments: str) -> None:
        """More of the call's arguments."""

    def finish(self) -> None:
        """The call is whole."""


def after_blank(char: str | None = None) -> Reader:
    """The first character that is no white space, from `char` on."""
    if char is None:
        char = yield
    while char in BLANK:
        char = yield
    return char


def string_behind_quote() -> Reader:
    """The text of a JSON string, behind its opening quote."""
    raw = '"'
    while True:
        char = yield
        raw += char
        if char == "\\":
            raw += yield
        elif char == '"':
            try:
                return json.loads(raw, strict=False)
            except ValueError as error:
                raise NoCall from error


def value(char: str, out: Any) -> Reader:
    """Any JSON value that begins with `char`, given to `out` as it comes; -> the character behind it, if it was read.

    Line ends and the like in strings are written as JSON wants them.
    """
    closers: list[str] = []
    while True:
        if char == '"':
            out(char)
            while (char := (yield)) != '"':
                out(char if char >= " " else json.dumps(char)[1:-1])
                if char == "\\":
                    out((yield))
            out(char)
        elif char in "{[":
            out(char)
            closers.append("}" if char == "{" else "]")
        elif closers and char == closers[-1]:
            out(char)
            closers.pop()
        elif closers and (char in BLANK or char in ",:"):
            out(char)
        elif char.isascii() and (char.isalnum() or char in "+-."):
            while char.isascii() and (char.isalnum() or char in "+-."):
                out(char)
                char = yield
            if not closers:
                return char
            continue
        else:
            raise NoCall
        if not closers:
            return None
        char = yield


def json_call(sink: Sink) -> Reader:
    """{"name": ..., "arguments": {...}} behind its opening brace, keys in any order; others are left out."""
    name: str | None = None
    waiting: list[str] | None = None  # arguments that came before the name
    is_begun = has_arguments = False
    char = yield from after_blank()
    while char != "}":
        if char != '"':
            raise NoCall
        key = yield from string_behind_quote()
        if (yield from after_blank()) != ":":
            raise NoCall
        char = yield from after_blank()
        following = None
        if key == "name" and char == '"' and name is None:
            name = yield from string_behind_quote()
            if waiting is not None:
                sink.begin(name)
                is_begun = True
                sink.more("".join(waiting))
        elif key in ARGUMENTS and not has_arguments:
            has_arguments = True
            following, written = None, []
            if char == "{" and name is not None:
                sink.begin(name)
                is_begun = True
                following = yield from value(char, sink.more)
            else:
                following = yield from value(char, written.append)
                waiting = [object_text("".join(written))]
                if name is not None:
                    sink.begin(name)
                    is_begun = True
                    sink.more(waiting[0])
        else:
            following = yield from value(char, lambda _: None)
        char = yield from after_blank(following)
        if char == ",":
            char = yield from after_blank()
        elif char != "}":
            raise NoCall
    if name is None:
        raise NoCall
    if not is_begun:
        sink.begin(name)
        sink.more("{}")
    sink.finish()


def literal(text: str, char: str | None = None) -> Reader:
    """Exactly this text, of which `char` may have been read."""
    for wanted in text:
        if (char if char is not None else (yield)) != wanted:
            raise NoCall
        char = None


def named_call(sink: Sink, name: str) -> Reader:
    """The arguments of a call whose name is known."""
    char = yield from after_blank()
    if char != "{":
        raise NoCall
    sink.begin(name)
    yield from value(char, sink.more)
    sink.finish()


def until(end: str, char: str = "") -> Reader:
    """The text in front of `end`."""
    text = char
    while not text.endswith(end):
        text += yield
    return text.removesuffix(end)


def object_text(written: str) -> str:
    """Arguments as the JSON of an object, where they were given as such, as a text that holds it, or as null."""
    try:
        found = json.loads(written)
        if isinstance(found, str):
            written, found = found, json.loads(found)
    except ValueError as error:
        raise NoCall from error
    if found is None:
        return "{}"
    if not isinstance(found, dict):
        raise NoCall
    return written


def json_array(sink: Sink, char: str) -> Reader:
    """Calls in an array, from the first character behind its opening bracket on."""
    while char != "]":
        if char != "{":
            raise NoCall
        yield from json_call(sink)
        char = yield from after_blank()
        if char == ",":
            char = yield from after_blank()
        elif char != "]":
            raise NoCall


def json_calls(sink: Sink) -> Reader:
    """One call, or several in an array."""
    char = yield from after_blank()
    if char == "{":
        yield from json_call(sink)
    elif char == "[":
        yield from json_array(sink, (yield from after_blank()))
    else:
        raise NoCall


def python_array(sink: Sink, char: str) -> Reader:
    """name(key=literal, ...) in a list, from the first character behind its opening bracket on."""
    while char != "]":
        name = ""
        while char.isidentifier() or (name and (char.isalnum() or char in "_.-")):
            name += char
            char = yield
        if not name or (yield from after_blank(char)) != "(":
            raise NoCall
        yield from python_call(sink, name)
        char = yield from after_blank()
        if char == ",":
            char = yield from after_blank()
        elif char != "]":
            raise NoCall


def python_call(sink: Sink, name: str) -> Reader:
    """The arguments of a call behind its parenthesis, which are shown as JSON once it is closed.

    A dict behind ** has some of them, as in Python.
    """
    arguments = []
    char = yield from after_blank()
    while char != ")":
        if char == "*":
            yield from literal("*")
            written, char = yield from python_literal((yield from after_blank()))
            if not written.startswith("{"):
                raise NoCall
            arguments += filter(None, [written[1:-1].strip()])
        else:
            key = ""
            while char.isidentifier() or (key and char.isalnum()):
                key += char
                char = yield
            if not key or (yield from after_blank(char)) != "=":
                raise NoCall
            written, char = yield from python_literal((yield from after_blank()))
            arguments.append(f"{json.dumps(key)}: {written}")
        if char == ",":
            char = yield from after_blank()
    sink.begin(name)
    sink.more(f"{{{', '.join(arguments)}}}")
    sink.finish()


def python_literal(char: str) -> Reader:
    """A Python literal as JSON, and the character behind it, "," or ")"."""
    written, closers = "", []
    while True:
        if char in "'\"":
            quote = char
            written += char
            while (char := (yield)) != quote:
                written += char if char >= " " else f"\\x{ord(char):02x}"
                if char == "\\":
                    written += yield
            written += char
        elif not closers and char in ",)":
            break
        else:
            written += char
            if char in "([{":
                closers.append(")]}"["([{".index(char)])
            elif closers and char == closers[-1]:
                closers.pop()
        char = yield
    written = written.strip()
    try:  # JSON, with its true, false and null, or what is the same in Python
        json.loads(written, parse_constant=int)  # which takes no NaN
        return written, char
    except (ValueError, RecursionError):
        pass
    try:
        return json_text(ast.literal_eval(ast.parse(written, FILE, "eval"))), char
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise NoCall from error


def json_text(value: Any) -> str:
    """A value as JSON that UTF-8 can hold: halves of surrogate pairs stay escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text) else json.dumps(value)
