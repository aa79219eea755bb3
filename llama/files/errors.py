"""What is said of a file: why it cannot be read or written, what was found in it, and values from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_LINE = 2000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line that names the file and, where there is one, the tensor.

    Names come from the file, so what a terminal would not print as it is becomes "?", and long lines are cut.
    """

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else "?" for char in message)
        super().__init__(line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "...")


def shown(value: Any) -> str:
    """A value from a file, short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Finding:
    """One thing that was checked in a file."""

    ok: bool
    subject: str
    message: str
