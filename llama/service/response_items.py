"""The items that a response's input is made of, as messages of ours, and its tools.

Source: OpenAI's API reference, "Responses".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.chat import Message, ToolUse
from llama.service.fields import Fields, Ignored, parse
from llama.service.refusal import Refusal
from llama.service.tools import offered

ItemContent = str | list[dict[str, Any]]
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # where the text is


class InputItem(Fields):
    """One kind of item. Keys that are not known are left alone: clients send back what they were given, and more."""

    @abstractmethod
    def messages(self) -> Iterator[Message]:
        """What it says, as messages that those of its neighbours may join. Raises Refusal."""


class MessageItem(InputItem):
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent

    def messages(self) -> Iterator[Message]:
        role = "system" if self.role == "developer" else self.role
        yield {"role": role, "content": "\n".join(part_texts("content", self.content))}


class CallItem(InputItem):
    call_id: str
    name: str
    arguments: str

    def messages(self) -> Iterator[Message]:
        call = {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        yield {"role": "assistant", "content": "", "tool_calls": [call]}


class CallOutputItem(InputItem):
    call_id: str
    output: ItemContent

    def messages(self) -> Iterator[Message]:
        yield {"role": "tool", "content": "\n".join(part_texts("output", self.output)), "tool_call_id": self.call_id}


class ReasoningItem(InputItem):
    """What a model thought in earlier turns: nothing of it is told again."""

    def messages(self) -> Iterator[Message]:
        yield from ()


INPUT_ITEMS: dict[str, type[InputItem]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


def input_dialog(instructions: str | None, items: str | list[dict[str, Any]]) -> list[Message]:
    """Items as a dialog: what an assistant's turn is made of is one message, and so are instructions in a row.

    Raises Refusal.
    """
    given: Iterable[Message] = [{"role": "user", "content": items}] if isinstance(items, str) else read_items(items)
    told: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    dialog: list[Message] = []
    for role, group in groupby([*told, *given], itemgetter("role")):
        messages = list(group)
        dialog += [joined_turn(messages)] if role in ("assistant", "system") else messages
    return dialog


def read_items(items: list[dict[str, Any]]) -> Iterator[Message]:
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in INPUT_ITEMS:
            raise Refusal(
                f"input.{number} is of type {str(kind)[:40]!r}, which is not served: give one of "
                f"{', '.join(INPUT_ITEMS)}",
                param=f"input.{number}",
                code="unsupported_parameter",
            )
        try:
            yield from parse(INPUT_ITEMS[kind], item, ignore_unknown=True).messages()
        except Refusal as error:
            where = f"input.{number}"
            raise Refusal(f"{where}.{error}", param=f"{where}.{error.param}", code=error.code) from error


def joined_turn(messages: list[Message]) -> Message:
    """Messages of one role as one."""
    text = "\n".join(filter(None, (message["content"] for message in messages)))
    calls = list(chain.from_iterable(message.get("tool_calls", ()) for message in messages))
    joined: Message = {"role": messages[0]["role"], "content": text}
    return joined | {"tool_calls": calls} if calls else joined


def part_texts(where: str, content: ItemContent) -> Iterator[str]:
    """Of parts that can only be texts."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type")
        text = part.get(TEXT_PARTS.get(kind, "")) if isinstance(kind, str) else None
        if not isinstance(text, str):
            message = f"{where} has a part of type {str(kind)[:40]!r} that is no text: give input_text"
            raise Refusal(message, param=where, code="unsupported_parameter")
        yield text


class ResponseTool(Fields):
    """A function; tools of OpenAI's own run on their side."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: Ignored = None
    allowed_callers: Ignored = None
    defer_loading: Ignored = None

    def to_json(self) -> dict[str, Any]:
        """As a response shows it: with every key."""
        return self.model_dump(include={"type", "name", "description", "parameters", "strict"})

    def to_openai(self) -> dict[str, Any]:
        """As chats have it."""
        parts = {"name": self.name, "description": self.description or "", "parameters": self.parameters or {}}
        return {"type": "function", "function": {**parts, "strict": bool(self.strict)}}


class NamedChoice(Fields):
    type: Literal["function"]
    name: str


class AllowedChoices(Fields):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedChoice]


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoices


def response_tool_use(tools: list[ResponseTool], choice: ToolChoice, parallel: bool) -> ToolUse:
    """Raises Refusal."""
    if isinstance(choice, AllowedChoices):
        names = [tool.name for tool in choice.tools]
        tools, choice = [tool for tool in tools if tool.name in names], choice.mode
    elif isinstance(choice, NamedChoice):
        choice = choice.name
    return offered([tool.to_openai() for tool in tools], choice, parallel)
