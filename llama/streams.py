"""Standard input, output and error as a program may find them: closed, missing, in any encoding, without an end."""

from __future__ import annotations

import io
import os
import select
import sys


def printable(text: str) -> str:
    """Text that cannot move the cursor or colour the terminal: control characters but \\n and \\t are dropped."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def tell(text: str) -> None:
    """Prints a line on standard error, where there is one, in one piece: others may write there too."""
    if sys.stderr is not None:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()


def note(text: str) -> None:
    """Prints a dim line on standard error, for a person who is looking there; nothing in a pipe."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        console.print(printable(text), style="dim", highlight=False, markup=False)


def repair() -> None:
    """Makes the standard streams usable: a closed one leads nowhere, and what cannot be encoded becomes "?".

    A closed descriptor is taken, lest the next file that is opened gets its number and what was meant for a stream.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (for as long as we run)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def piped_text() -> str:
    """What stands on standard input besides a message that was given; "" where that is a terminal.

    A pipe is read to its end, with a word if it is slow. But a program that starts us may leave us its own standard
    input, where nothing may ever come: of that, only what has come is read.
    """
    if sys.stdin.isatty():
        return ""
    if not _has_come():
        if _is_inherited():
            tell("nothing is on standard input so far: going on without it")
            return ""
        tell("waiting for standard input ... (</dev/null says that there is none)")
    return sys.stdin.read()


def _has_come() -> bool:
    """Whether standard input would not block; taken for true where only sockets can be asked (Windows)."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except OSError:
        return True


def _is_inherited() -> bool:
    """Whether standard input is the same as our parent's, as far as the system tells (Linux)."""
    try:
        return os.path.samestat(os.fstat(sys.stdin.fileno()), os.stat(f"/proc/{os.getppid()}/fd/0"))
    except OSError:
        return False
