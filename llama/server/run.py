"""From settings to a running server: the socket, uvicorn, what stands around the app, signals, the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llama.cluster import planned
from llama.generation import Llama
from llama.parallel import end_process, num_launched
from llama.server.app import make_app
from llama.server.connection import Connection
from llama.server.engine_thread import EngineThread
from llama.server.front import Front
from llama.server.guard import AllowedHosts, Guard, is_loopback
from llama.server.holder import ModelHolder
from llama.server.limits import BodyLimits
from llama.server.logs import RequestLog
from llama.server.page_files import page_files
from llama.server.ranks import follow
from llama.server.server import Server
from llama.server.settings import ServerSettings, listed
from llama.server.shutdown import Service, Shutdown
from llama.streams import tell

Made = tuple[Service, ASGIApp]  # what is served, and the application that answers for it
KEEP_ALIVE = 75  # seconds: longer than clients and proxies keep a connection
PUBLIC = ("/health",)  # needs no key


class Listener(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(build: Callable[[], Llama], settings: ServerSettings) -> None:
    """Serves until a signal stops it. Raises what kept the model from loading, or ended it.

    Under torchrun rank 0 serves, and the others help it. Several ranks, and one whose engine's thread is still busy
    (it loads, or waits for others), end their process here.
    """
    error: Exception | None = None
    try:
        if int(os.environ.get("RANK", 0)):
            holder = ModelHolder(build)
            holder.build()
            follow(holder, settings.rank_timeout)
        else:
            serve_first(build, settings)
    except Exception as caught:
        error = caught
    is_busy = any(isinstance(thread, EngineThread) for thread in threading.enumerate())
    if is_busy or num_launched() > 1:
        end_process(error)
    if error is not None:
        raise error


def serve_first(build: Callable[..., Llama], settings: ServerSettings) -> None:
    """What one process does, or the first of several."""

    def make() -> Made:
        server = Server(build, settings)
        return server, make_app(server)

    with listening_at(settings) as listening:
        asyncio.run(serve_on(listening, make, lambda server, stop: announce(server, listening)))


def run_replicas(
    model: str | None, load: dict[str, Any], settings: ServerSettings, num_replicas: int, address: str | None
) -> None:
    """Serves replicas of a model on the Ray cluster at an address, or one of their own, until a signal stops them.

    Raises RuntimeError or ValueError for what keeps them from running.
    """
    with listening_at(settings) as listening, planned(model, load, num_replicas, address) as plan:
        from llama.server.fleet import ServeFleet

        def make() -> Made:
            front = Front(ServeFleet(plan, settings, is_guest=address is not None), settings)
            return front, front

        asyncio.run(serve_on(listening, make, lambda front, stop: announce(front, listening)))


@contextlib.contextmanager
def listening_at(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket that listens until the end of the block; warns where everybody may use what is behind it."""
    if not settings.keys() and not is_loopback(settings.host):
        tell(f"llama: warning: whoever reaches {settings.host} may use the model; --api-key asks for a key")
    with bound(settings) as listening:
        yield listening


def announce(service: Service, listening: socket.socket) -> None:
    """Tells where what is ready now is to be found."""
    host, port = listening.getsockname()[:2]
    scheme = "http" if service.settings.ssl_certfile is None else "https"
    where = f"[{host}]" if ":" in host else host
    tell(f"Serving {service.name} at {scheme}://{where}:{port} (open it in a browser to chat; Ctrl-C stops)")


def bound(settings: ServerSettings) -> socket.socket:
    """A socket that listens, before a model is loaded in vain. Raises OSError that names the port."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
        # Its connections inherit it. asyncio sets it only where a socket names its protocol; without it the second
        # packet of a response waits until the client has acknowledged the first, which takes Linux 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        reason = str(error.strerror).partition(" (while")[0]  # Python repeats the address there
        raise OSError(f"cannot listen at {where}: {reason}; give another --host or --port") from error


def surrounded(app: ASGIApp, service: Service) -> ASGIApp:
    """The app behind what every request passes: the log, the guard, the limits."""
    settings = service.settings
    limited = BodyLimits(app, max_bytes=settings.max_body, timeout=settings.body_timeout, check=service.check_body)
    guarded = Guard(
        limited,
        hosts=AllowedHosts.of(settings.host, listed(settings.allowed_hosts)),
        keys=settings.keys(),
        admin_key=settings.admin_key,
        public=(*PUBLIC, *page_files()),
        origins=listed(settings.allowed_origins),
    )
    return RequestLog(
        guarded, write=(lambda line: None) if settings.quiet else tell, tell_failure=tell, count=service.metrics.count
    )


async def serve_on(
    listening: socket.socket,
    make: Callable[[], Made],
    announce: Callable[[Service, Callable[[], None]], None],
) -> None:
    """Starts a service beside the listener, so that who asks meanwhile is told; `announce` gets what stops it."""
    service, app = make()
    settings = service.settings
    config = uvicorn.Config(
        surrounded(app, service),
        http=Connection,
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",  # whatever is to be told of requests is told by RequestLog
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    try:
        config.load()
    except OSError as error:
        what = f"{settings.ssl_certfile} holds no certificate with its key, in PEM"
        raise OSError(f"{what}: give --ssl-certfile and --ssl-keyfile ({error})") from error
    listener = Listener(config)
    shutdown = Shutdown(service, listener)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, shutdown.ask)
    listening_task = asyncio.create_task(listener.serve(sockets=[listening]))
    watching = [asyncio.create_task(service.metrics.watch_loop())]
    if num_launched() > 1:
        watching.append(asyncio.create_task(shutdown.ask_when_orphaned()))
    try:
        if await shutdown.unless_asked(service.start()):
            announce(service, shutdown.ask)
            await shutdown.unless_asked(asyncio.shield(service.ended))
        await shutdown.drain()
    finally:
        for task in watching:
            task.cancel()
        listener.should_exit = True
        await listening_task
        await service.close()
