"""What an assistant is asked: messages, and what the model is told besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a dialog. Keys other than these two are ignored."""

    role: Role
    content: str


Dialog = list[Message]


class DialogError(ValueError, AssertionError):
    """The dialog does not suit its format. (An AssertionError too, because the reference raises that.)"""


@dataclass(frozen=True)
class Prompt:
    """A dialog to be answered, with what a model's own template may tell it besides. Raises DialogError.

    There is at least one message, and each has a role and content, both text. `tools` are descriptions of
    functions as OpenAI's API has them, `options` are further variables of the template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise DialogError("the dialog is empty; give at least one message, from the user")
        for number, message in enumerate(self.messages, 1):
            content = message.get("content") if isinstance(message, dict) else None
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise DialogError(f"message {number} is not of the form {{'role': text, 'content': text}}")

    @classmethod
    def of(cls, asked: Prompt | Dialog) -> Prompt:
        """A prompt as it is; a dialog as the prompt that is nothing else. Raises DialogError."""
        return asked if isinstance(asked, Prompt) else cls(tuple(asked or ()))


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The content of the system message at the start, None where there is none, and the other messages."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def with_system(dialog: Dialog, text: str) -> Dialog:
    """A new dialog that begins with this system message instead of its own; empty text: with none."""
    turns = split_system(dialog)[1]
    return [{"role": "system", "content": text}, *turns] if text else list(turns)
