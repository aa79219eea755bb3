"""What an assistant is asked: messages, and what the model is told besides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a dialog. Other keys are ignored."""

    role: Role
    content: str  # or OpenAI's list of parts, each {"type": "text", "text": text}
    tool_calls: NotRequired[list[dict[str, Any]]]  # the assistant's, as OpenAI's API has them; arguments may be a dict
    tool_call_id: NotRequired[str]  # of the call that a tool's message answers
    name: NotRequired[str]  # of the tool that it is from


Dialog = list[Message]


class DialogError(ValueError, AssertionError):
    """The dialog does not suit its format. (An AssertionError too, because the reference raises that.)"""


@dataclass(frozen=True)
class Prompt:
    """A dialog to be answered, with what a model's own template may tell it besides. Raises DialogError.

    There is at least one message, and each has a role and content, both text: OpenAI's list of text parts is joined,
    an assistant's message without content is empty. `tools` are descriptions of functions as OpenAI's API has them,
    `options` are further variables of the template. `continues`: the last message is the assistant's, and the answer
    goes on from it, from its very last character.
    """

    messages: Sequence[Message]  # kept as a tuple
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False

    def __post_init__(self) -> None:
        if not self.messages:
            raise DialogError("the dialog is empty; give at least one message, from the user")
        messages = tuple(_message(number, given) for number, given in enumerate(self.messages, 1))
        object.__setattr__(self, "messages", messages)
        if self.continues and messages[-1]["role"] != "assistant":
            role = messages[-1]["role"]
            raise DialogError(f"there is no answer to continue: the last message has role {role!r}, not 'assistant'")
        if self.continues and len(messages) == 1:
            raise DialogError("the dialog is nothing but an answer to continue; give the user's message before it")

    @classmethod
    def of(cls, asked: Prompt | Dialog) -> Prompt:
        """A prompt as it is; a dialog as the prompt that is nothing else. Raises DialogError."""
        return asked if isinstance(asked, Prompt) else cls(tuple(asked or ()))


def _message(number: int, given: object) -> Message:
    role, content = (given.get("role"), given.get("content")) if isinstance(given, dict) else (None, None)
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(number, part) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DialogError(f"message {number} is not of the form {{'role': text, 'content': text}}")
    message: Message = {"role": role, "content": content}
    if role == "assistant" and given.get("tool_calls"):
        message["tool_calls"] = [_call(number, call) for call in given["tool_calls"]]
    if role == "tool":
        message |= {key: given[key] for key in ("tool_call_id", "name") if isinstance(given.get(key), str)}
    return message


def _call(number: int, given: object) -> dict[str, Any]:
    """A call with its arguments as templates want them: as a mapping, if they are one."""
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DialogError(f"message {number} has a call that is none; give {{'function': {{'name': ..., ...}}}}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):  # an answer that was cut off
            found = arguments
        arguments = found if isinstance(found, dict) else arguments
    elif not isinstance(arguments, Mapping):
        raise DialogError(f"message {number} calls {function['name'][:64]!r} with arguments that are no JSON object")
    call_id = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {**call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _part_text(number: int, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DialogError(f"message {number} has a part that is no text; give {{'type': 'text', 'text': text}} only")
    return text


def free_characters(texts: Iterable[str]) -> Iterator[str]:
    """Private code points that occur in none of the texts; raises DialogError where there is none left."""
    used = set().union(*texts)
    yield from (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
    raise DialogError("the dialog uses up Unicode's private code points; take some out")


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The content of the system message at the start, None where there is none, and the other messages."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def with_system(dialog: Dialog, text: str) -> Dialog:
    """A new dialog that begins with this system message instead of its own; empty text: with none."""
    turns = split_system(dialog)[1]
    return [{"role": "system", "content": text}, *turns] if text else list(turns)


def one_line(message: object) -> str:
    """What a template or jinja2 says, in 200 characters at most."""
    return " ".join(str(message).split())[:200]
