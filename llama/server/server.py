"""What all requests share: the engine's thread, the model, a pool for what takes long, and the limits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama.checkpoint import models_in
from llama.generation import Llama
from llama.server.engine_thread import EngineThread
from llama.server.models import ServedModel
from llama.server.settings import ServerSettings
from llama.service import Call, Endpoint, Refusal

RETRY_AFTER = 1  # seconds
LAST_STEP = 0.5  # seconds that the engine's thread has to end its step

HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # what may become half of a character outside the basic plane


class Server:
    """What the routes share. `llm` and `model` are there once the engine's thread is `ready`."""

    def __init__(self, build: Callable[[], Llama], settings: ServerSettings):
        self.settings = settings
        self.engine = EngineThread(build, asyncio.get_running_loop(), settings.rank_timeout)
        self.metrics = self.engine.metrics
        self.is_draining = False
        self.changing = asyncio.Lock()  # around changes of the model and its adapters
        self._num_opening = 0  # calls that are being prepared
        self._pool = ThreadPoolExecutor(settings.num_workers, thread_name_prefix="request")

    @property
    def is_ready(self) -> bool:
        ready = self.engine.ready
        return ready.done() and ready.exception() is None and not self.engine.ended.done()

    @property
    def llm(self) -> Llama:
        return self.engine.ready.result()

    @property
    def model(self) -> ServedModel:
        return self._model

    async def start(self) -> None:
        """Loads the model. Raises what kept it from loading."""
        self.engine.start()
        llm = await self.engine.ready
        self._model = ServedModel.of(llm, self.settings.name, self.engine)
        self.metrics.watch(llm, self.model.name, self.settings.max_queue)

    async def close(self) -> None:
        """Ends the engine's thread, if it is at work: a step that has begun may take some time."""
        if self.is_ready:
            self.engine.stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_STEP):
                    await asyncio.shield(self.engine.ended)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def others(self, only: str | None = None) -> dict[str, Path]:
        """Models of the folder that could be served instead, by name; with `only` at most that one."""
        found = models_in(self.settings.model_dir, only) if self.settings.model_dir else {}
        served = self.llm.checkpoint and self.llm.checkpoint.path.resolve()
        return {name: path for name, path in found.items() if path.resolve() != served}

    def unavailable(self) -> Refusal:
        message = "the server is stopping" if self.is_draining else "Loading model"
        return Refusal(message, status=503, kind="unavailable_error", code="unavailable", retry_after=RETRY_AFTER)

    def check_available(self) -> None:
        """Raises Refusal while the model is loading, and once a stop was asked for."""
        if self.is_draining or not self.is_ready:
            raise self.unavailable()

    async def in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls what may take long where the event loop does not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def open(self, endpoint: Endpoint, body: bytes, salt: bytes = b"") -> Call:
        """The call that a body asks for; `salt` keeps what is cached for it from calls of another. Raises Refusal."""
        self.check_available()
        if len(self.engine.streams) + self._num_opening >= self.settings.max_queue:
            raise Refusal(
                f"{self.settings.max_queue} requests are at work or waiting: try again",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                retry_after=RETRY_AFTER,
            )
        self._num_opening += 1
        try:
            return await self.in_pool(self._open, endpoint, body, salt)
        finally:
            self._num_opening -= 1

    def _open(self, endpoint: Endpoint, body: bytes, salt: bytes) -> Call:
        parsed = read_body(body)
        given = parsed.get("model") if isinstance(parsed, dict) else None
        if endpoint.needs_model and not given:
            raise Refusal(
                f"model: give the model's name ({self.model.name} is served; GET /v1/models lists them)",
                param="model",
                code="missing_required_parameter",
            )
        names = self.model.names()
        is_other = isinstance(given, str) and given not in names
        if is_other and (self.settings.strict_model or self.others(given)):
            raise Refusal(
                f"the model {given[:100]!r} is not served: give {' or '.join(names)}",
                param="model",
                code="model_not_found",
                status=404,
            )
        call = Call.open(
            self.llm,
            endpoint,
            parsed,
            model=given or self.model.name,
            salt=salt,
            can_stream=endpoint.frames is not None,
            ignore_unknown=self.settings.ignore_unknown,
            adapter_of=self.model.adapters.choose,
        )
        most = max((query.params.n for query in call.queries), default=1)
        if most > self.settings.max_n:
            raise Refusal(f"n is {most}: at most {self.settings.max_n} answers are given to a prompt", param="n")
        return call


def read_body(body: bytes) -> Any:
    """Raises Refusal for what is no JSON, is nested too deeply to be meant, or holds halves of characters."""
    try:
        parsed = json.loads(body)
        if HALF.search(body):
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {error}", code="invalid_json") from error
