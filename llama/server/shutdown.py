"""How a server ends: what has begun may go on for a while, nothing new begins, and everybody is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Protocol

import uvicorn

from llama.server.metrics import Metrics
from llama.server.settings import ServerSettings

LOOK = 0.05  # seconds between two looks at what is still open
FAREWELL = 0.5  # seconds for the last words of streams that are cut off


class Service(Protocol):
    """What a process serves: a model of its own, or replicas of one elsewhere.

    `name`: that of the model. `ended` is set when nothing more can be answered, with the error that ended it, if any.
    """

    settings: ServerSettings
    metrics: Metrics
    is_draining: bool

    @property
    def name(self) -> str: ...

    @property
    def ended(self) -> asyncio.Future[None]: ...

    async def start(self) -> None:
        """Returns when requests are answered. Raises what keeps them from it."""

    def check_body(self, path: str) -> None:
        """Raises Refusal where a request's body need not be read."""

    def fail(self, error: str) -> None:
        """Tells everybody who waits that nothing more will come."""

    async def close(self) -> None:
        """Lets go of everything."""


class Shutdown:
    """What a signal asks for. A second one asks not to wait any longer.

    It listens on meanwhile, so that /health can say 503 and new requests are sent elsewhere.
    """

    def __init__(self, service: Service, listener: uvicorn.Server):
        self.service = service
        self.listener = listener
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()

    def ask(self) -> None:
        if self._asked.is_set():
            self._hurried.set()
        self._asked.set()
        self.service.is_draining = True

    async def ask_when_orphaned(self) -> None:
        """Asks when this process' parent has ended, as torchrun does where it is killed: nobody else would."""
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(1)
        self.ask()

    async def unless_asked(self, work: Awaitable[object]) -> bool:
        """Waits for the work until a stop is asked for. Returns whether the work is done, or raises its error."""
        working, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if not working.done():
            working.cancel()
            return False
        working.result()
        return True

    async def drain(self) -> None:
        """Waits for open requests, and then no longer: what is left of them is told that it ends."""
        await self._wait(self.service.settings.shutdown_timeout)
        self.service.fail("the server is stopping")
        self._hurried.clear()
        await self._wait(FAREWELL)
        if self.listener.server_state.tasks:  # whoever does not read, or sends a body without end
            for connection in list(self.listener.server_state.connections):
                connection.transport.abort()

    async def _wait(self, seconds: float) -> None:
        """Until no request is open, or it is asked to hurry."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.listener.server_state.tasks and loop.time() < end and not self._hurried.is_set():
            await asyncio.sleep(LOOK)
