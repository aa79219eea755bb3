"""Calls of tools: what a model asks for, and the pieces that it comes in."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass

from llama.tool_call import ToolCall


@dataclass(frozen=True)
class CallPiece:
    """More of an answer's call number `index`: its name, which comes first and alone, or more of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""
    id: str = ""  # with the name


AnswerPiece = str | CallPiece  # text that is for people, or more of a call


@dataclass(frozen=True)
class Spoken:
    """An answer taken apart: what it says, and the calls that it makes."""

    content: str
    calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, pieces: Iterable[AnswerPiece]) -> Spoken:
        content, names, arguments, ids = "", {}, {}, {}
        for piece in pieces:
            if isinstance(piece, str):
                content += piece
                continue
            if piece.name is not None:
                names[piece.index], ids[piece.index] = piece.name, piece.id
            arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
        return cls(content, tuple(ToolCall(names[i], arguments[i], ids[i]) for i in sorted(names)))


def new_call_id(num_characters: int | None = None) -> str:
    """An id for a call: as OpenAI's, or of so many letters and digits."""
    if num_characters is None:
        return f"call_{secrets.token_hex(12)}"
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(num_characters))
