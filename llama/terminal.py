"""A chat in a terminal, or through a pipe: messages in, streamed answers out."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from rich.console import Console

from llama.chat import Dialog, DialogError, fit_dialog, with_system
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.streams import note, piped_text, printable

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit (or q) leaves"


class Interrupt:
    """Ctrl-C while an answer is streamed: the first one ends the answer, a second one the program."""

    def __init__(self) -> None:
        self.pressed = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


class Chat:
    """A conversation. Under torchrun rank 0 reads and prints, and every rank keeps the same dialog."""

    def __init__(self, llm: Llama, params: SamplingParams, system: str | None = None):
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
            if not self.llm.chat_format.is_unsafe(turn):  # else all that follow would be refused with it
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
        """The dialog without as many of its oldest turns as leave room for an answer."""
        dialog = turns if self.system is None else with_system(turns, self.system)
        max_seq_len = self.llm.max_seq_len
        room = min(self.params.max_tokens or max_seq_len // 4, max_seq_len // 2)
        return fit_dialog(dialog, max_seq_len - room, self.llm.tokenizer, self.llm.chat_format)


def show(llm: Llama, pieces: Iterable[str]) -> None:
    """Prints a text as it comes, on rank 0; the others take their part in making it."""
    for piece in pieces:
        if llm.rank == 0:
            print(printable(piece), end="", flush=True)
    if llm.rank == 0:
        print(flush=True)


def stream(chat: Chat, message: str) -> None:
    """Prints one answer as it comes; Ctrl-C ends it."""

    def pieces() -> Iterator[str]:
        answer = chat.answer(message)
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
    with Interrupt() as interrupt:
        show(chat.llm, pieces())


def messages(llm: Llama, history: Path | None = None) -> Iterator[str]:
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


def with_piped(llm: Llama, message: str) -> str:
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
            except DialogError as error:
                told, style = str(error), "red"
        if told is not None and chat.llm.rank == 0:
            console.print(printable(told), style=style, highlight=False, markup=False)
