"""What all requests share: the engine's thread, the model, a pool for what takes long, and the limits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llama.checkpoint import models_in
from llama.generation import Llama
from llama.server.engine_thread import EngineThread
from llama.server.models import ServedModel
from llama.server.refusing import RETRY_AFTER, unavailable
from llama.server.settings import ServerSettings
from llama.service import Call, Endpoint, Refusal

LOAD, UNLOAD = "/v1/internal/model/load", "/v1/internal/model/unload"  # which are open while there is no model
LAST_STEP = 0.5  # seconds that the engine's thread has to end its step

HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # what may become half of a character outside the basic plane


class Server:
    """What the routes share. There is a `model`, and an `llm`, but for the time in which one is loaded.

    `build` makes a model as a `ModelHolder` asks for it.
    """

    def __init__(self, build: Callable[..., Llama], settings: ServerSettings):
        self.settings = settings
        self.engine = EngineThread(build, asyncio.get_running_loop(), settings.rank_timeout)
        self.metrics = self.engine.metrics
        self.is_draining = False
        self.loading: str | None = ""  # the name of the model that is being loaded, if it has one yet; else None
        self._model: ServedModel | None = None
        self.changing = asyncio.Lock()  # around changes of the model and its adapters
        self._num_opening = 0  # calls that are being prepared
        self._pool = ThreadPoolExecutor(settings.num_workers, thread_name_prefix="request")

    @property
    def llm(self) -> Llama:
        return self.model.llm

    @property
    def model(self) -> ServedModel:
        """Raises Refusal where there is none."""
        if self._model is None:
            raise self.unavailable()
        return self._model

    @property
    def name(self) -> str:
        """The model's. Raises Refusal where there is none."""
        return self.model.name

    @property
    def ended(self) -> asyncio.Future[None]:
        """When the engine's thread has nothing more to do, with the error that ended it, if one did."""
        return self.engine.ended

    @property
    def has_model(self) -> bool:
        return self._model is not None

    @property
    def num_open(self) -> int:
        """Requests that are being prepared or answered."""
        return len(self.engine.streams) + self._num_opening

    async def start(self) -> None:
        """Loads the model. Raises what kept it from loading."""
        self.engine.start()
        await self.engine.ready
        self.serve(self.settings.name)
        self.loading = None

    def serve(self, name: str | None) -> None:
        """From now on the model that the engine's thread holds is served, under this name or that of its path."""
        llm = self.engine.holder.llm
        self._model = ServedModel.of(llm, name, self.engine)
        self.metrics.watch(llm, self._model.name, self.settings.max_queue)

    def let_go(self) -> None:
        """The model is served no longer."""
        self._model = None
        self.metrics.watch(None, "")

    def fail(self, error: str) -> None:
        """Tells everybody who waits that nothing more will come."""
        self.engine.fail(error)

    async def close(self) -> None:
        """Ends the engine's thread, if it is at work: a step that has begun may take some time."""
        ready = self.engine.ready
        if ready.done() and ready.exception() is None and not self.engine.ended.done():
            self.engine.stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_STEP):
                    await asyncio.shield(self.engine.ended)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def others(self, only: str | None = None) -> dict[str, Path]:
        """Models of the folder that could be served instead, by name; with `only` at most that one."""
        found = models_in(self.settings.model_dir, only) if self.settings.model_dir else {}
        served = self._model and self.llm.checkpoint and self.llm.checkpoint.path.resolve()
        return {name: path for name, path in found.items() if path.resolve() != served}

    def unavailable(self) -> Refusal:
        if self.is_draining:
            message = "the server is stopping"
        elif self.loading is None:
            message = f"no model is loaded: POST {LOAD} loads one, GET /v1/internal/model/list names them"
        else:
            message = f"Loading model {self.loading}".rstrip()
        return unavailable(message)

    def check_available(self) -> None:
        """Raises Refusal while a model is loading or none is there, and once a stop was asked for."""
        if self.is_draining or self.loading is not None or self._model is None or self.engine.ended.done():
            raise self.unavailable()

    def check_body(self, path: str) -> None:
        """Raises Refusal for a path whose body need not be read now; a model can be asked for while there is none."""
        if self.is_draining or path not in (LOAD, UNLOAD) or not self.engine.ready.done():
            self.check_available()

    async def in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls what may take long where the event loop does not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def open(self, endpoint: Endpoint, body: bytes, salt: bytes = b"") -> Call:
        """The call that a body asks for; `salt` keeps what is cached for it from calls of another. Raises Refusal."""
        self.check_available()
        model = self.model
        if self.num_open >= self.settings.max_queue:
            raise Refusal(
                f"{self.settings.max_queue} requests are at work or waiting: try again",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                retry_after=RETRY_AFTER,
            )
        self._num_opening += 1
        try:
            call = await self.in_pool(self._open, model, endpoint, body, salt)
        except Exception as error:
            raise error if self._model is model else self.unavailable() from error
        finally:
            self._num_opening -= 1
        if self._model is not model:  # it was made for that one
            raise self.unavailable()
        return call

    def _open(self, model: ServedModel, endpoint: Endpoint, body: bytes, salt: bytes) -> Call:
        parsed = read_body(body)
        given = parsed.get("model") if isinstance(parsed, dict) else None
        if endpoint.needs_model and not given:
            raise Refusal(
                f"model: give the model's name ({model.name} is served; GET /v1/models lists them)",
                param="model",
                code="missing_required_parameter",
            )
        adapters = model.adapters.names
        names = [model.name, *adapters]
        is_other = isinstance(given, str) and given not in names
        if is_other and (self.settings.strict_model or self.others(given)):
            raise Refusal(
                f"the model {given[:100]!r} is not served: give {' or '.join(names)}",
                param="model",
                code="model_not_found",
                status=404,
            )
        call = Call.open(
            model.llm,
            endpoint,
            parsed,
            model=given or model.name,
            salt=salt,
            can_stream=endpoint.frames is not None,
            ignore_unknown=self.settings.ignore_unknown,
            adapter_of=partial(model.adapters.choose, adapters),
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
