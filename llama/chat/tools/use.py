"""What tools a model is offered, and which it has to call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama.chat.tools.call_schema import Tool, calls_or_json, is_nested_within
from llama.chat.tools.formats import ToolFormat

MOST_TOOLS = 128  # OpenAI's limit
DEEPEST_PARAMETERS = 64  # brackets of a schema


class ToolError(ValueError):
    """Tools that cannot be offered, or a choice among them that there is not; `param` is OpenAI's field."""

    def __init__(self, message: str, param: str = "tools") -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class ToolUse:
    """The tools on offer: descriptions of functions as OpenAI's API has them, or Python's own functions.

    choice: "auto" leaves it to the model, "required" wants a call, "none" offers nothing, and any other text is the
    name of the one function to call. parallel: whether there may be several calls. Raises ToolError.
    """

    tools: Sequence[Tool | Callable[..., Any]] = ()
    choice: Literal["auto", "required", "none"] | str = "auto"
    parallel: bool = True

    def __post_init__(self) -> None:
        if len(self.tools) > MOST_TOOLS:
            raise ToolError(f"{len(self.tools)} tools are given: at most {MOST_TOOLS} are taken")
        tools = tuple(describe(tool) if callable(tool) else checked(tool) for tool in self.tools)
        object.__setattr__(self, "tools", tools)
        names = self.names
        if len(set(names)) < len(names):
            raise ToolError(f"two tools have one name: {', '.join(sorted(names))}")
        if self.is_named and self.choice not in names:
            raise ToolError(f"tool_choice names {self.choice!r}: there are {', '.join(names) or 'none'}", "tool_choice")
        if self.choice == "required" and not names:
            raise ToolError("tool_choice wants a call, and no tools are given", "tool_choice")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.tools)

    @property
    def is_named(self) -> bool:
        return self.choice not in ("auto", "required", "none")

    @property
    def offered(self) -> tuple[Tool, ...]:
        """What the model is told of."""
        return () if self.choice == "none" else tuple(self.tools)

    @property
    def callable_names(self) -> tuple[str, ...]:
        return (self.choice,) if self.is_named else tuple(tool["function"]["name"] for tool in self.offered)

    def grammar(self, format: ToolFormat, schema: Mapping[str, Any] | None = None) -> str | None:
        """What keeps an answer to the choice, and arguments to their schemas; None where nothing has to.

        schema: of an answer that calls nothing, where it need not.
        """
        tools = [tool for tool in self.offered if tool["function"]["name"] in self.callable_names]
        if self.is_named:
            return format.required(tools, False)
        if self.choice == "required":
            return format.required(tools, self.parallel)
        if schema is not None and tools:
            return calls_or_json(format.required(tools, self.parallel), schema)
        if tools and (not self.parallel or any(tool["function"].get("strict") for tool in tools)):
            return format.optional(tools, self.parallel)
        return None


def checked(tool: object) -> Tool:
    """The description of a function, if it is one."""
    function = (
        tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
    )
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ToolError("tools holds what is no function: give {'type': 'function', 'function': {'name': text, ...}}")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise ToolError(f"the parameters of {function['name'][:64]!r} are no JSON schema")
    if not is_nested_within(function.get("parameters"), DEEPEST_PARAMETERS):
        raise ToolError(f"the parameters of {function['name'][:64]!r} are nested more than {DEEPEST_PARAMETERS} deep")
    return {"type": "function", "function": dict(function)}


def describe(function: Callable[..., Any]) -> Tool:
    """What a Python function's name, type hints and documentation say of it, as a description for models."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"{function.__name__} takes *args, **kwargs or nameless arguments: name each with its type")
        hint = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    parameters = create_model(function.__name__, __config__=config, **fields).model_json_schema()
    parameters.pop("title", None)
    described = {"name": function.__name__, "description": inspect.getdoc(function) or "", "parameters": parameters}
    return {"type": "function", "function": described}
