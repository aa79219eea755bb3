"""One call's events on their way from the engine's thread to the connection that waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from llama.answer import Event, Inbox
from llama.service import Call


class CallStream:
    """The events of one call. `inbox` is the engine thread's; all else is the event loop's.

    `num_open`: how many of its answers have not ended. `opened`, `first`, `last`: when it was opened and when its first
    and latest events came, in seconds of `time.perf_counter`.
    """

    def __init__(self, call: Call):
        self.call = call
        self.inbox = Inbox()
        self.num_open = call.num_completions
        self.opened = time.perf_counter()
        self.first: float | None = None
        self.last: float | None = None
        self.error: Exception | None = None  # why nothing more will come
        self._pending: list[Event] = []
        self._woken = asyncio.Event()

    def put(self, events: Sequence[Event], now: float) -> None:
        """Further events of the call."""
        self.first = self.first or now
        self.last = now
        self.num_open -= sum(event.completion is not None for event in events)
        self._pending += events
        self._woken.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will come: `rounds` raises the error."""
        self.error = self.error or error
        self._woken.set()

    async def rounds(
        self, first_silence: float | None = None, silence: float | None = None
    ) -> AsyncIterator[list[Event]]:
        """What has come since the last time, in one go, until all answers have ended.

        So a slow reader gets fewer and larger pieces. An empty list says that nothing came for `silence` seconds, or
        for `first_silence` before anything did; None never says so. Raises RuntimeError where something went wrong,
        Refusal where the call cannot be answered any more.
        """
        patience = first_silence
        while self.num_open or self._pending:
            if not self._pending and self.error is None:
                self._woken.clear()
                try:
                    async with asyncio.timeout(patience):
                        await self._woken.wait()
                except TimeoutError:
                    patience = silence
                    yield []
                continue
            if self.error is not None:
                raise self.error
            events, self._pending = self._pending, []
            for event in events:
                if event.finish_reason in ("error", "abort") and not event.completion.refused:
                    raise RuntimeError(event.error or "the request was aborted")
            patience = silence
            yield events
