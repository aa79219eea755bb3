"""A chat in a terminal, or through a pipe: lines in, streamed answers out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from types import FrameType

from rich.console import Console

from llama.chat import Dialog, DialogError, fit_dialog, with_system
from llama.generation import Llama
from llama.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit (or q) leaves"


def printable(text: str) -> str:
    """Text that cannot move the cursor or colour the terminal: control characters but \\n and \\t are dropped."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


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
        """The pieces of the answer; message and answer join the conversation, also if the caller stops early."""
        dialog = self._fitted([*self.turns, {"role": "user", "content": message}])
        pieces: list[str] = []
        try:
            for piece in self.llm.stream_chat(dialog, self.params):
                pieces.append(piece)
                yield piece
        finally:
            self.turns += [
                {"role": "user", "content": message},
                self.llm.chat_format.parse("".join(pieces)),
            ]

    def command(self, line: str) -> str | None:
        """Obeys a line that begins with a slash; returns what to tell the person."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.turns = []
            return "The conversation is forgotten."
        if name == "/system":
            self.system = rest.strip() or None
            return "The system prompt is set." if self.system else "There is no system prompt now."
        return HELP if name == "/help" else f"{name} is no command: {HELP}"

    def _fitted(self, turns: Dialog) -> Dialog:
        """The dialog without as many of its oldest turns as leave room for an answer."""
        dialog = turns if self.system is None else with_system(turns, self.system)
        max_seq_len = self.llm.max_seq_len
        room = min(self.params.max_tokens or max_seq_len // 4, max_seq_len // 2)
        return fit_dialog(dialog, max_seq_len - room, self.llm.tokenizer, self.llm.chat_format)


def stream(chat: Chat, message: str) -> None:
    """Prints one answer as it comes."""
    console = Console(stderr=True)
    show = chat.llm.rank == 0
    waiting = console.status("Thinking ...") if show and console.is_terminal else nullcontext()
    with Interrupt() as interrupt:
        pieces = chat.answer(message)
        with waiting:
            first = next(pieces, "")
        if show:
            print(printable(first), end="", flush=True)
        for piece in pieces:
            if show:
                print(printable(piece), end="", flush=True)
            if interrupt.pressed:
                pieces.close()
        if show:
            print()


def lines(llm: Llama, console: Console) -> Iterator[str]:
    """What the person types, until the end of the input; every rank gets the same lines."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and llm.rank == 0:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives input() a history and an editable line)
        console.print(f"{HELP}.", style="dim", highlight=False)
    while True:
        line = None
        if llm.rank == 0:
            try:
                line = input("\n> " if interactive else "")
            except EOFError:
                pass
            except KeyboardInterrupt:
                console.print("\n/quit leaves.", style="dim", highlight=False)
                line = ""
        line = llm.share(line)
        if line is None or line.strip() in ("/quit", "q", "Q"):
            return
        if line.strip():
            yield line.strip()


def run(chat: Chat) -> None:
    """The whole conversation, until /quit or the end of the input."""
    console = Console(stderr=True)
    for line in lines(chat.llm, console):
        if line.startswith("/"):
            told = chat.command(line)
            if chat.llm.rank == 0:
                console.print(told, style="dim", highlight=False)
            continue
        try:
            stream(chat, line)
        except DialogError as error:
            console.print(str(error), style="red", highlight=False)
