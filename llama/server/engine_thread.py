"""The thread that alone uses the engine: calls come in by a queue, and each step's events go out at one blow."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from llama.answer import Event
from llama.generation import Llama
from llama.parallel import Signal, Watchdog
from llama.server.holder import ModelHolder, RanksDiffer
from llama.server.metrics import Metrics
from llama.server.ranks import BEAT_SECONDS, silence, together
from llama.server.stream import CallStream
from llama.service import Call

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
Delivery = Sequence[tuple[CallStream, list[Event]]]


class EngineThread(Thread):
    """Builds a model, then answers calls until it is told to stop; `switch` has it put another in its place.

    `open`, `close`, `fail` and `metrics` belong to the event loop, `ask` to any thread; the rest runs in this one.
    `ready` tells when the first model is built, or why it could not be; `ended` is set when the thread has nothing more
    to do, with the error that ended it, if one did. Where there are several ranks, the others hear of this one while it
    waits, and one that is not there for `rank_timeout` seconds is such an error.
    """

    def __init__(self, build: Callable[..., Llama], loop: asyncio.AbstractEventLoop, rank_timeout: float = 60.0):
        super().__init__(name="engine", daemon=True)
        self.holder = ModelHolder(build)
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.streams: set[CallStream] = set()
        self.metrics = Metrics()
        self._loop = loop
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._admitted: set[CallStream] = set()  # the thread's own
        self._asked: set[Future[Any]] = set()
        self._asking = Lock()  # around `_asked`, and around the end of the thread
        self._is_over = False
        self._watchdog = Watchdog(rank_timeout, lambda: self._lose(silence(rank_timeout)))

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
            self.metrics.finished["abort"] += stream.num_open
            self._commands.put(lambda: self._leave(stream))

    def ask(self, function: Callable[[], _T]) -> Future[_T]:
        """Has the thread call a function between two steps, from any thread. Raises there what the function raises."""
        asked: Future[_T] = Future()

        def answer() -> None:
            try:
                asked.set_result(function())
            except Exception as error:
                asked.set_exception(error)
                if isinstance(error, RanksDiffer):
                    raise
            finally:
                with self._asking:
                    self._asked.discard(asked)

        with self._asking:
            if self._is_over:
                raise RuntimeError("the model has stopped")
            self._asked.add(asked)
        self._commands.put(answer)
        return asked

    def call(self, name: str, *args: Any) -> None:
        """In the thread: calls a method of the holder on every rank."""
        self.holder.call(name, *args)

    def switch(self, *source: Any) -> Future[None]:
        """Has the thread let go of the model and build that of a source, as the holder's `build` takes it; see `ask`.

        Without the model requests cannot be admitted: whoever calls this has seen to it that none come.
        """

        def switch() -> None:
            self._admitted.clear()
            with self._watchdog.held():
                self.call("build", *source)

        return self.ask(switch)

    def unload(self) -> Future[None]:
        """Has the thread let go of the model, as `switch` does."""

        def unload() -> None:
            self._admitted.clear()
            self.call("close")

        return self.ask(unload)

    def stop(self) -> None:
        """The thread ends when it has done what it was told before."""
        self._commands.put(None)

    def fail(self, error: str) -> None:
        """Tells everybody who waits that nothing more will come."""
        for stream in self.streams:
            stream.fail(RuntimeError(error))

    def _deliver(self, delivery: Delivery, now: float) -> None:
        for stream, events in delivery:
            stream.put(events, now)
        self.metrics.step(delivery, now)

    def _end(self, error: BaseException | None) -> None:
        if self.ended.done():
            return
        self.fail("the model has stopped" if error is None else "the model has failed")
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
            self.holder.build()
        except BaseException as error:  # SystemExit, too, is the main thread's to obey
            self._tell(self.ready.set_exception, error)
            return
        self._tell(self.ready.set_result, None)
        if self._leads:
            self._watchdog.start()
            if self.holder.parallel.heartbeat:
                self.holder.parallel.heartbeat.bark = self._lose
        try:
            with together(self.holder.parallel.size):
                while self._obey():
                    self._step()
                if self._leads:
                    self.holder.parallel.send(Signal.END, [])
        except BaseException as error:
            _log.exception("the engine's thread has failed")
            self._tell(self._end, error)
        else:
            self._tell(self._end, None)
        with self._asking:
            self._is_over = True
        for asked in self._asked:
            asked.set_exception(RuntimeError("the model has stopped"))
        self._watchdog.stop()

    @property
    def _leads(self) -> bool:
        return self.holder.parallel.leads

    def _lose(self, silence: str) -> None:
        """The thread waits for ranks that are not there."""
        self._tell(self._end, RuntimeError(silence))

    def _obey(self) -> bool:
        """Does what was asked for since the last time; waits for it where there is nothing else to do."""
        wait = self.holder.llm is None or not self.holder.llm.engine.has_work
        while True:
            self._watchdog.pet()
            try:
                command = self._commands.get(wait, BEAT_SECONDS if self._leads else None)
            except Empty:
                if not wait:
                    return True
                self.holder.parallel.beat()
                continue
            if command is None:
                return False
            command()
            wait = False

    def _admit(self, stream: CallStream) -> None:
        self._admitted.add(stream)
        refused: list[Event] = []
        try:
            for place, query in enumerate(stream.call.queries):
                refused += self.holder.llm.engine.admit(stream.inbox, place, query, strict=True)
        except ValueError as error:  # its adapter was unloaded since the call was opened
            self._leave(stream)
            self._tell(stream.fail, stream.call.refusal(error))
            return
        if refused:
            self._send([(stream, refused)])

    def _leave(self, stream: CallStream) -> None:
        if stream in self._admitted:  # else it has ended, or its model has
            self.holder.llm.engine.leave(stream.inbox)
            self._admitted.discard(stream)

    def _step(self) -> None:
        """A step of the engine. Where the model fails the step's requests end, and the others go on.

        Several ranks have no common ground after that: then the thread ends.
        """
        if self.holder.llm is None:
            return
        try:
            self.holder.llm.engine.step()
        except Exception:
            if self.holder.parallel.size > 1:
                raise
            _log.exception("a step has failed")
        self._send([(stream, stream.inbox.take()) for stream in self._admitted if stream.inbox.events])
        self._admitted -= {stream for stream in self._admitted if not stream.inbox.places}

    def _send(self, delivery: Delivery) -> None:
        if delivery:
            self._tell(self._deliver, delivery, time.perf_counter())
