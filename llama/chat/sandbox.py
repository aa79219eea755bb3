"""The sandbox that chat templates run in."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from heapq import nlargest
from types import GeneratorType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llama.chat.prompt import DialogError, one_line


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with bounds on what a rendering may do.

    Templates come out of model files, which are not trusted: they reach nothing of Python's, and each loop
    step, call, filter and operator draws on a budget of characters, so that nothing runs or grows without end.
    What is written has a narrower one, `written_per_character`, where the template is a stranger's; and whatever
    the steps are, MOST_SECONDS of the processor's time is all that they get.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    BUDGET, PER_CHARACTER, STEP = 1 << 24, 256, 256
    MOST_SECONDS = 10.0

    def __init__(self, written_per_character: int = PER_CHARACTER) -> None:
        self.written_per_character = written_per_character
        extensions = [GenerationBlock, LoopControlExtension]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.allow(0)
        del self.filters["format"], self.filters["random"]
        self.filters = {name: self._metered(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": self._metered(to_json), "each": self._each}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def allow(self, num_characters: int) -> None:
        """Begin a rendering of so many characters of content."""
        self.left = self.BUDGET + self.PER_CHARACTER * num_characters
        self.room = self.BUDGET + self.written_per_character * num_characters
        self.until = time.thread_time() + self.MOST_SECONDS

    def from_string(self, source: str, *args: Any, **kwargs: Any) -> Any:
        """As jinja2, with loops and `~` put under the meter."""
        return super().from_string(Meter().visit(self.parse(source)), *args, **kwargs)

    def concat(self, parts: Iterable[str]) -> str:
        """How templates, macros and blocks join what they write."""
        return "".join(self._each(parts))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call."""
        self._check(getattr(function, "__self__", None), *args, *kwargs.values())
        return self._pay(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Every operator in `intercepted_binops`."""
        if operator == "%" and isinstance(left, str):
            validate_widths(left)
        self._check(left, right)
        return self._pay(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Jinja would give an undefined value, which prints as nothing."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What stands for `text.format`, if the attribute `value` is that."""
        if (safe_format := super().wrap_str_format(value)) is not None:
            validate_widths(value.__self__)
        return safe_format

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # and with it jinja2's mark of what to pass first
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._check(*args, *kwargs.values())
            return self._pay(function(*args, **kwargs))

        return metered

    def _check(self, *values: Any) -> None:
        """Before it is done: no operation gives more than its two largest operands multiplied."""
        largest, second = nlargest(2, [1, 1, *map(_size, values)])
        if largest * second > min(self.left, self.room):
            raise SecurityError("it makes a value larger than any prompt")

    def _pay(self, value: Any) -> Any:
        if isinstance(value, GeneratorType):
            return list(self._each(value))
        self._spend(_size(value))
        return value

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(_size(value) if isinstance(value, str) else 0)
            yield value

    def _spend(self, size: int) -> None:
        self.left -= size + self.STEP
        self.room -= size
        if min(self.left, self.room) < 0 or time.thread_time() > self.until:
            raise SecurityError("it runs longer or writes more than any prompt")


def _size(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | dict | range) else 1


class Meter(NodeTransformer):
    """Rewrites `for x in y` as `for x in y | each` and `a ~ b` as `[a, b] | join`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "each", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)


class GenerationBlock(Extension):
    """`{% generation %}` to `{% endgeneration %}` marks answers for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def validate_widths(form: str) -> None:
    """Raises SecurityError for a format that could make a short value long."""
    if re.search(r"[*]|[0-9]{4}", form):
        raise SecurityError("a format may not have a width of more than three digits")


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: object) -> NoReturn:
    """Templates' raise_exception."""
    raise DialogError(f"the model's chat template refuses this dialog: {one_line(message)}")
