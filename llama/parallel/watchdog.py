"""What ends a process that waits for others who will never come."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from llama.streams import tell


class Watchdog:
    """Calls `bark` once, from a thread of its own, when `pet` has not been called for `limit` seconds."""

    def __init__(self, limit: float, bark: Callable[[], object]):
        self.limit = limit
        self.bark = bark
        self._last = time.monotonic()
        self._is_held = False
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.pet()
        self._thread.start()

    def pet(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def held(self) -> Iterator[None]:
        """It does not bark meanwhile: what is done may take as long as it takes."""
        self._is_held = True
        try:
            yield
        finally:
            self.pet()
            self._is_held = False

    def stop(self) -> None:
        self._is_stopped.set()

    def _watch(self) -> None:
        while not self._is_stopped.wait(max(0.0, self._last + self.limit - time.monotonic())):
            if self._is_held:
                self.pet()
            elif time.monotonic() - self._last >= self.limit:
                self.bark()
                return


def end_process(error: Exception | None) -> NoReturn:
    """Ends at once, whatever other threads wait for and libraries would still tidy up; with the error, if any."""
    if error is not None:
        tell(f"llama: {' '.join(str(error).split())}")
    sys.stdout.flush()
    os._exit(error is not None)
