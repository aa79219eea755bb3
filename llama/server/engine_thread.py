"""The thread that alone uses the engine: calls come in by a queue, and each step's events go out at one blow."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

from llama.answer import Event
from llama.engine import EngineStats
from llama.generation import Llama
from llama.server.stream import CallStream
from llama.service import Call

_log = logging.getLogger(__name__)

Delivery = Sequence[tuple[CallStream, list[Event]]]


class EngineThread(Thread):
    """Builds a model, then answers calls until it is told to stop.

    `open`, `close` and what `on_step` gets belong to the event loop; the rest runs in the thread. `ready` tells the
    model when it is built, or why it could not be; `ended` is set when the thread has nothing more to do, with the
    error that ended it, if one did.
    """

    def __init__(self, build: Callable[[], Llama], loop: asyncio.AbstractEventLoop):
        super().__init__(name="engine", daemon=True)
        self.ready: asyncio.Future[Llama] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.streams: set[CallStream] = set()
        self.on_step: Callable[[EngineStats, Delivery, float], None] | None = None
        self._build = build
        self._loop = loop
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._admitted: set[CallStream] = set()  # the thread's own

    # ---- the event loop's

    def open(self, call: Call) -> CallStream:
        """Has a call answered. Whoever opens a stream closes it, whatever happens."""
        stream = CallStream(call)
        self.streams.add(stream)
        self._commands.put(lambda: self._admit(stream))
        return stream

    def close(self, stream: CallStream) -> None:
        """Frees what the call still holds."""
        self.streams.discard(stream)
        if stream.num_open:
            self._commands.put(lambda: self._leave(stream))

    def stop(self) -> None:
        """The thread ends when it has done what it was told before."""
        self._commands.put(None)

    def _deliver(self, stats: EngineStats, delivery: Delivery, now: float) -> None:
        for stream, events in delivery:
            stream.put(events, now)
        if self.on_step is not None:
            self.on_step(stats, delivery, now)

    def _end(self, error: BaseException | None) -> None:
        for stream in self.streams:
            stream.fail("the model has stopped" if error is None else f"the model has failed: {error}")
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody listens any more
            _log.debug("an event loop has ended before its engine")

    # ---- the thread's

    def run(self) -> None:
        try:
            self._llm = self._build()
        except BaseException as error:  # SystemExit, too, is the main thread's to obey
            self._tell(self.ready.set_exception, error)
            return
        self._tell(self.ready.set_result, self._llm)
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            _log.exception("the engine's thread has failed")
            self._tell(self._end, error)
        else:
            self._tell(self._end, None)

    def _obey(self) -> bool:
        """Does what was asked for since the last time; waits for it where there is nothing else to do."""
        wait = not self._llm.engine.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _admit(self, stream: CallStream) -> None:
        self._admitted.add(stream)
        refused: list[Event] = []
        for place, query in enumerate(stream.call.queries):
            refused += self._llm.engine.admit(stream.inbox, place, query)
        if refused:
            self._send([(stream, refused)])

    def _leave(self, stream: CallStream) -> None:
        self._llm.engine.leave(stream.inbox)
        self._admitted.discard(stream)

    def _step(self) -> None:
        """A step of the engine. Where the model fails the step's requests end, and the others go on.

        Several ranks have no common ground after that: then the thread ends.
        """
        try:
            self._llm.engine.step()
        except Exception:
            if self._llm.model.parallel.size > 1:
                raise
            _log.exception("a step has failed")
        self._send([(stream, stream.inbox.take()) for stream in self._admitted if stream.inbox.events])
        self._admitted -= {stream for stream in self._admitted if not stream.inbox.places}

    def _send(self, delivery: Delivery) -> None:
        if delivery:
            self._tell(self._deliver, self._llm.engine.stats(), delivery, time.perf_counter())
