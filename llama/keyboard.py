"""Messages as a person types them: a line that can be edited, several lines where they are wanted, a history."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.utils import is_dumb_terminal

from llama.streams import tell

PROMPT = "\n> "
HINT = "Enter sends; Alt-Enter, or a backslash at the end of a line, begins another line"


def typed(history: Path | None = None) -> Iterator[str]:
    """What a person types, message by message, until Ctrl-D. Raises OSError where the history cannot be kept.

    The prompt is shown where there is a terminal: on standard error if the output is piped elsewhere.
    """
    read = read_plainly if is_dumb_terminal() else session(history).prompt
    while True:
        try:
            yield read(PROMPT)
        except KeyboardInterrupt:
            tell("/quit leaves.")
        except EOFError:
            return


def read_plainly(prompt: str) -> str:
    """A line from a terminal that can do nothing but print."""
    print(prompt, end="", file=sys.stderr, flush=True)
    try:
        return input()
    except EOFError:
        tell("")  # what comes next begins on a line of its own
        raise


def session(history: Path | None) -> PromptSession[str]:
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # a terminal need not answer where its cursor is
    return PromptSession(
        multiline=True,  # so that a paste of several lines is one message
        key_bindings=keys(),
        history=open_history(history),
        output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        enable_suspend=True,
        prompt_continuation="  ",
    )


def keys() -> KeyBindings:
    """What Enter does to a message; in a search of the history it keeps its meaning."""
    bindings = KeyBindings()
    at_message = has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=at_message)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=at_message)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


def open_history(path: Path | None) -> History:
    """The messages that were typed before; a new file is for its owner alone."""
    if path is None:
        return InMemoryHistory()
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return FileHistory(path)
