"""Another model in the place of the one that is served, without a restart; and the old one back where that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from llama.checkpoint import models_in, open_checkpoint
from llama.server.adapters import ServedAdapter
from llama.server.server import Server
from llama.server.shutdown import FAREWELL, LOOK
from llama.service import Refusal, failure


@dataclass(frozen=True)
class ModelSource:
    """What a model is made of: its name here, and what a `ModelHolder` builds it from, nothing for the first one."""

    name: str
    given: Sequence[Any] = ()


class ModelSwitch:
    """Switches a server's model. Whoever calls it does so one at a time.

    Nobody is admitted meanwhile. What is being answered may go on for `shutdown_timeout` seconds, and is cut off then.
    The old model is gone before the new one is built: there need not be memory for both.
    """

    def __init__(self, server: Server):
        self.server = server
        self._first: ModelSource | None = None
        self._source: ModelSource | None = None  # of the model that is served

    def names(self) -> list[str]:
        """Of the models that can be served: the first one, and those of the server's folder."""
        folder = self.server.settings.model_dir
        own = [self._current().name] if self.server.has_model else []
        found = list(models_in(folder)) if folder else []
        return list(dict.fromkeys([*own, *([self._first.name] if self._first else []), *found]))

    async def load(self, name: str, options: Mapping[str, Any]) -> None:
        """Has the model of that name served, built with these parameters of `Llama.build`.

        Raises Refusal: at once for what is not there or cannot be opened; later with the old model back at its place,
        or with both errors and none.
        """
        old = self._current()
        source = await asyncio.to_thread(self._find, name, options)
        adapters = list(self.server.model.adapters) if self.server.has_model else []
        async with self._pause(name):
            try:
                await self._build(source)
            except Exception as error:
                said = f"{name} could not be loaded: {error}"
                if old is None:
                    raise failure(f"{said}; no model is loaded") from error
                self.server.loading = old.name
                try:
                    await self._build(old)
                    await self._load_again(adapters)
                except Exception as worse:
                    raise failure(f"{said}; and {old.name} could not be loaded again: {worse}") from error
                raise failure(f"{said}; {old.name} is there again") from error

    async def unload(self) -> None:
        """Has no model served."""
        self._current()
        async with self._pause(""):
            self._source = None
            await asyncio.wrap_future(self.server.engine.unload())

    def _current(self) -> ModelSource | None:
        """The source of the model that is served."""
        if self._first is None and self.server.has_model:
            self._first = self._source = ModelSource(self.server.model.name)
        return self._source

    def _find(self, name: str, options: Mapping[str, Any]) -> ModelSource:
        folder = self.server.settings.model_dir
        path = models_in(folder, name).get(name) if folder else None
        if path is not None:
            try:
                open_checkpoint(path)  # what cannot be opened is refused while the old model answers
            except (OSError, ValueError) as error:
                raise Refusal(f"{name} could not be loaded: {error}", param="model_name") from error
            return ModelSource(name, (str(path), dict(options)))
        if self._first is None or name != self._first.name:
            there = ", ".join(self.names()) or "none: start the server with --model-dir DIR, a folder of models"
            message = f"no model {name[:200]!r} can be loaded; there are: {there}"
            raise Refusal(message, param="model_name", code="model_not_found", status=404)
        if options:
            message = f"{name} is not in the folder of models: it is loaded as the server was started; leave args out"
            raise Refusal(message, param="args")
        return self._first

    async def _build(self, source: ModelSource) -> None:
        self._source = None
        await asyncio.wrap_future(self.server.engine.switch(*source.given))
        self.server.serve(source.name)
        self._source = source

    async def _load_again(self, adapters: Sequence[ServedAdapter]) -> None:
        """Those of a model that was built again, with their numbers' strengths; what it brought itself is there."""
        served = self.server.model.adapters
        for one in adapters:
            if served.find(one.name) is None:
                await asyncio.to_thread(served.load, one.name, one.path)
        scales = {one.name: one.scale for one in adapters if one.scale}
        await asyncio.to_thread(served.set_scales, scales)

    @asynccontextmanager
    async def _pause(self, name: str) -> AsyncIterator[None]:
        """A time without a model, from the moment on that nobody waits for the old one any more."""
        server = self.server
        server.loading = name
        try:
            await self._wait(server.settings.shutdown_timeout)
            server.engine.fail("the model is being switched")
            await self._wait(FAREWELL)
            server.let_go()
            yield
        finally:
            server.loading = None

    async def _wait(self, seconds: float) -> None:
        """Until no request is open."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.server.num_open and loop.time() < end:
            await asyncio.sleep(LOOK)
