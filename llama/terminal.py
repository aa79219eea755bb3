"""A chat in a terminal, or through a pipe: messages in, streamed answers out."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console

from llama.chat import Dialog, DialogError, with_system
from llama.client import RemoteError
from llama.sampling_params import SamplingParams
from llama.streams import note, piped_text, printable

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit (or q) leaves"


class Speaker(Protocol):
    """Whom a conversation is held with: a model here (`Llama`), or one behind a server (`RemoteModel`)."""

    rank: int
    chat_format: Any  # of which `parse` and `is_unsafe` are used

    def share(self, value: Any) -> Any: ...
    def fit(self, dialog: Dialog, params: SamplingParams) -> Dialog: ...
    def stream_chat(self, dialog: Dialog, params: SamplingParams) -> Iterator[str]: ...


class AnswerEnded(Exception):
    """Ctrl-C has ended the answer."""


class Interrupt:
    """Ctrl-C while an answer is streamed: the first one ends the answer, a second one the program.

    The first one is noted, for a model's step must not be broken off, or with `at_once` raises AnswerEnded.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.pressed = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        if self.at_once:
            raise AnswerEnded

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


class Chat:
    """A conversation. Under torchrun rank 0 reads and prints, and every rank keeps the same dialog.

    ends_at_once: whether whatever `llm` waits for may be broken off.
    """

    def __init__(
        self, llm: Speaker, params: SamplingParams, system: str | None = None, *, ends_at_once: bool = False
    ) -> None:
        self.ends_at_once = ends_at_once
        self.llm = llm
        self.params = params
        self.system = system
        self.turns: Dialog = []

    def answer(self, message: str) -> Iterator[str]:
        """The pieces of the answer; message and answer join the conversation, also if the caller stops early.

        What the chat format refuses does not join it.
        """
        dialog = self._fitted([*self.turns, {"role": "user", "content": message}])
        pieces: list[str] = []
        try:
            for piece in self.llm.stream_chat(dialog, self.params):
                pieces.append(piece)
                yield piece
        finally:
            turn = [{"role": "user", "content": message}, self.llm.chat_format.parse("".join(pieces))]
            if pieces and not self.llm.chat_format.is_unsafe(turn):  # else all that follow would be refused with it
                self.turns += turn

    def command(self, line: str) -> str | None:
        """Obeys a line that begins with a command's word; returns what to tell the person.

        None: the line is a message, as one that begins with a path is. A lone word behind a slash is taken for a
        slip of the keyboard.
        """
        word, *rest = line.split(maxsplit=1)
        if word == "/reset":
            self.turns = []
            return "The conversation is forgotten."
        if word == "/system":
            self.system = rest[0] if rest else None
            return "The system prompt is set." if self.system else "There is no system prompt now."
        if word == "/help":
            return HELP
        return f"{line} is no command: {HELP}" if re.fullmatch("/[a-z]+", line) else None

    def _fitted(self, turns: Dialog) -> Dialog:
        """What is asked: as many of the turns as leave room for an answer."""
        return self.llm.fit(turns if self.system is None else with_system(turns, self.system), self.params)


def show(llm: Speaker, pieces: Iterable[str]) -> None:
    """Prints a text as it comes, on rank 0; the others take their part in making it."""
    for piece in pieces:
        if llm.rank == 0:
            print(printable(piece), end="", flush=True)
    if llm.rank == 0:
        print(flush=True)


def stream(chat: Chat, message: str) -> None:
    """Prints one answer as it comes; Ctrl-C ends it."""
    answer = chat.answer(message)

    def pieces() -> Iterator[str]:
        with waiting:
            first = next(answer, "")
        yield first
        for piece in answer:
            yield piece
            if interrupt.pressed:
                answer.close()

    console = Console(stderr=True)
    shown = chat.llm.rank == 0 and console.is_terminal
    waiting = console.status("Thinking ...") if shown else nullcontext()
    with Interrupt(chat.ends_at_once) as interrupt:
        try:
            show(chat.llm, pieces())
        except AnswerEnded:
            print(flush=True)
        finally:
            answer.close()


def messages(llm: Speaker, history: Path | None = None) -> Iterator[str]:
    """What the person says, until the end of the input; every rank gets the same.

    On a terminal a message may have several lines; in a pipe each line is one.
    """
    said = iter(())
    if llm.rank == 0:
        said = iter(sys.stdin)
        if has_terminal():
            from llama.keyboard import HINT, typed

            note(f"{HELP}. {HINT}.")
            said = typed(history)
    while True:
        message = llm.share(next(said, None))
        if message is None or message.strip() in ("/quit", "q", "Q"):
            return
        if message.strip():
            yield message.strip()


def with_piped(llm: Speaker, message: str) -> str:
    """The message, and below it what comes through a pipe besides; every rank gets the same."""
    piped = piped_text() if llm.rank == 0 else ""
    return llm.share(f"{message}\n\n{piped}" if piped.strip() else message)


def has_terminal() -> bool:
    """Whether a person can be shown a prompt, and type."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def run(chat: Chat, history: Path | None = None) -> None:
    """The whole conversation, until /quit or the end of the input."""
    console = Console(stderr=True)
    for message in messages(chat.llm, history):
        told, style = chat.command(message), "dim"
        if told is None:
            try:
                stream(chat, message)
            except (DialogError, RemoteError) as error:
                told, style = str(error), "red"
        if told is not None and chat.llm.rank == 0:
            console.print(printable(told), style=style, highlight=False, markup=False)
