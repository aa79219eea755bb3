"""A terminal for a program to be started in, and a person at it who waits for what is shown."""

import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence

PATIENCE = 120  # seconds; only a failing test waits so long


class Terminal:
    """`command` with its standard input and error on a terminal, and its output too or in a pipe."""

    def __init__(self, command: Sequence[str], *, output_in_pipe: bool = False, **environment: str):
        self._keyboard, screen = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            command,
            stdin=screen,
            stdout=subprocess.PIPE if output_in_pipe else screen,
            stderr=screen,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
        )
        os.close(screen)

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait_for(self, text: str) -> str:
        """All that was shown since the last wait, up to `text`."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.shown:
            ready, _, _ = select.select([self._keyboard], [], [], max(0, deadline - time.monotonic()))
            piece = self._read() if ready else b""
            if not piece:
                raise AssertionError(f"{text!r} did not come: {self.shown!r}")
            self.shown += piece.decode(errors="replace")
        before, self.shown = self.shown.split(text, 1)
        return before + text

    def end(self) -> tuple[int, str, str]:
        """Waits for the program: (status, what was shown since the last wait, what the pipe holds)."""
        output = self.process.stdout.read().decode() if self.process.stdout else ""
        while piece := self._read():
            self.shown += piece.decode(errors="replace")
        os.close(self._keyboard)
        return self.process.wait(), self.shown, output

    def _read(self) -> bytes:
        try:
            return os.read(self._keyboard, 65536)
        except OSError:  # Linux's way to say that nobody has the other end open
            return b""
