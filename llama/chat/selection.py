"""Which chat format a model gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama.chat.formats import FORMATS, ChatFormat, ChatFormatError, ChatMLFormat, Llama2Format, Llama3Format
from llama.chat.template import JinjaFormat
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
