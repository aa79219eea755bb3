"""Dialogs, shown as the model is given them and cut to what fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from llama.chat.formats import ChatFormat
from llama.chat.prompt import Dialog, DialogError, Prompt, split_system
from llama.chat.selection import choose_format

if TYPE_CHECKING:  # which needs torch
    from llama.tokenizer import Tokenizer

_Asked = TypeVar("_Asked", Dialog, Prompt)


@dataclass(frozen=True)
class FormattedDialog:
    """A prompt to look at: `text` shows each control token as its string, `tokens` are the ids."""

    text: str
    tokens: list[int]


def format_dialog(dialog: Dialog, tokenizer: Tokenizer, chat_format: str | ChatFormat | None = None) -> FormattedDialog:
    """What the model is given for a dialog, in the format that `choose_format` chooses. Raises DialogError."""
    chosen = choose_format(chat_format, tokenizer)
    return FormattedDialog(chosen.text(dialog), chosen.encode(dialog))


def fit_dialog(
    dialog: Dialog, max_tokens: int, tokenizer: Tokenizer, chat_format: str | ChatFormat | None = None
) -> Dialog:
    """A new dialog, without as many of the oldest turns as it takes for the prompt to have `max_tokens` or fewer.

    A turn is a user's message and all up to the next one; a system message at the start stays. Raises
    DialogError where even the last turn is too long.
    """
    chosen = choose_format(chat_format, tokenizer)
    return list(_first_that_fits(shortened(dialog), max_tokens, chosen))


def fit_prompt(prompt: Prompt, max_tokens: int, chat_format: ChatFormat) -> Prompt:
    """The same for a prompt, whose tools and options stay."""
    rests = [replace(prompt, messages=messages) for messages in shortened(list(prompt.messages))]
    return _first_that_fits(rests, max_tokens, chat_format)


def _first_that_fits(rests: Sequence[_Asked], max_tokens: int, chat_format: ChatFormat) -> _Asked:
    first = bisect_left(rests, True, key=lambda rest: len(chat_format.encode(rest)) <= max_tokens)
    if first == len(rests):
        num_tokens = len(chat_format.encode(rests[-1]))
        raise DialogError(
            f"the last message takes {num_tokens} tokens with its format, only {max_tokens} fit; shorten it"
        )
    return rests[first]


def shortened(dialog: Dialog) -> list[Dialog]:
    """The dialog, the same without its oldest turn, without its two oldest, and so on up to its last turn.

    A turn is a user's message and all up to the next one; a system message at the start stays.
    """
    start = len(dialog) - len(split_system(Prompt.of(dialog).messages)[1])
    later_turns = [i for i in range(start + 1, len(dialog)) if dialog[i]["role"] == "user"]
    return [dialog, *(dialog[:start] + dialog[i:] for i in later_turns)]
