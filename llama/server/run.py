"""From settings to a running server: the socket, uvicorn, signals, the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from llama.generation import Llama
from llama.server.app import make_app
from llama.server.server import Server
from llama.server.settings import ServerSettings
from llama.streams import tell

KEEP_ALIVE = 75  # seconds: longer than clients and proxies keep a connection


class Listener(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(build: Callable[[], Llama], settings: ServerSettings) -> None:
    """Serves until a signal stops it. Raises what kept the model from loading, or ended it."""

    def announce(server: Server, stop: Callable[[], None]) -> None:
        host, port = listening.getsockname()[:2]
        tell(f"Serving {server.model.name} at http://{host}:{port} (Ctrl-C stops)")

    with bound(settings) as listening:
        asyncio.run(serve_on(listening, build, settings, announce))


def bound(settings: ServerSettings) -> socket.socket:
    """A socket that listens, before a model is loaded in vain. Raises OSError that names the port."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        raise OSError(f"cannot listen at {where}: {error.strerror}; give another --host or --port") from error


async def serve_on(
    listening: socket.socket,
    build: Callable[[], Llama],
    settings: ServerSettings,
    announce: Callable[[Server, Callable[[], None]], None],
) -> None:
    """Loads the model beside the listener, so that who asks meanwhile is told; `announce` gets what stops it."""
    server = Server(build, settings)
    config = uvicorn.Config(
        make_app(server),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
    )
    listener = Listener(config)

    def stop() -> None:
        server.is_draining = True
        listener.should_exit = True

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
    listening_task = asyncio.create_task(listener.serve(sockets=[listening]))
    try:
        await server.start()
        announce(server, stop)
        await listening_task
    finally:
        listener.should_exit = True
        await listening_task
        await server.close()
