"""Which chat format a model gets."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llama.chat.formats import FORMATS, ChatFormat, ChatFormatError, ChatMLFormat, Llama2Format, Llama3Format
from llama.chat.template import JinjaFormat, PastedFormat
from llama.chat.tools import choose_tool_format

if TYPE_CHECKING:  # which needs torch
    from llama.tokenizer import Tokenizer


def choose_format(
    chat_format: str | ChatFormat | None, tokenizer: Tokenizer, tool_format: str | None = None
) -> ChatFormat:
    """The chat format for a tokenizer, with the tool format of this name, or else the one that it finds itself.

    `chat_format` (a name in FORMATS, the path of a Jinja file, or one already chosen) comes first, then the
    model's own template, then Llama 2 for sentencepiece files; for another vocabulary, the format whose control
    tokens it holds. Raises ChatFormatError, or ValueError for a tool format that there is not.
    """
    chosen = _chosen(chat_format, tokenizer)
    if tool_format is not None:
        chosen.tool_format = choose_tool_format(chosen.template, chosen.control, tool_format)
    return chosen


def _chosen(chat_format: str | ChatFormat | None, tokenizer: Tokenizer) -> ChatFormat:
    if isinstance(chat_format, ChatFormat):
        return chat_format
    if chat_format in FORMATS:
        return FORMATS[chat_format](tokenizer)
    if chat_format is not None:
        return JinjaFormat(tokenizer, read_template(chat_format), f"chat template {chat_format}")
    if tokenizer.chat_template is not None:
        return JinjaFormat(tokenizer, tokenizer.chat_template, "the model's own chat template")
    if tokenizer.kind != "sentencepiece":
        for kind in (Llama3Format, ChatMLFormat):
            if all(token in tokenizer.special_tokens for token in kind.needs):
                return kind(tokenizer)
    return Llama2Format(tokenizer)


def read_template(path: str) -> str:
    """A Jinja file's text. Raises ChatFormatError."""
    if not Path(path).is_file():
        raise ChatFormatError(
            f"unknown chat format {path!r}; give one of {', '.join(FORMATS)}, or the path of a Jinja file"
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ChatFormatError(f"{path} is not a chat template: it is not text in UTF-8") from error


def given_format(text: str, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format that a request gives: a name in FORMATS, or a template itself. No file is read.

    Raises ChatFormatError.
    """
    if text in FORMATS:
        return FORMATS[text](tokenizer)
    if "{{" not in text and "{%" not in text:
        names = ", ".join(usable_formats(tokenizer))
        raise ChatFormatError(f"{text[:64]!r} is no chat format: give one of {names}, or a template in Jinja")
    return PastedFormat(tokenizer, text)


def usable_formats(tokenizer: Tokenizer) -> list[str]:
    """The names of the formats that a vocabulary has the control tokens for."""
    found = []
    for name, kind in FORMATS.items():
        with suppress(ChatFormatError):
            kind(tokenizer)
            found.append(name)
    return found
