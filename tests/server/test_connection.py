import asyncio

import pytest
import uvicorn
from support.loops import run_async

from llama.server import connection
from llama.server.connection import Connection


class Transport:
    """A socket that notes what becomes of it."""

    def __init__(self):
        self.sent, self.is_aborted = b"", False

    def get_extra_info(self, name):
        return None

    def write(self, data):
        self.sent += data

    def abort(self):
        self.is_aborted = True

    def close(self):
        self.is_aborted = True

    def is_closing(self):
        return self.is_aborted

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def answering(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def transport_after(*pieces: bytes, rounds: int = 0) -> Transport:
    """What a connection did with its transport by the time it got these pieces, and the loop went around."""
    transport = Transport()

    async def run():
        config = uvicorn.Config(answering, log_config=None, lifespan="off")
        one = Connection(config, uvicorn.server.ServerState(), {}, _loop=asyncio.get_running_loop())
        one.connection_made(transport)
        for piece in pieces:
            one.data_received(piece)
        for _ in range(rounds):
            await asyncio.sleep(0)
        one.connection_lost(ConnectionResetError())

    run_async(run())
    return transport


GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize("pieces", [[], [b"GET / HTTP/1.1\r\n"], [GET, b"GET / HT"], [b"\r\n"]])
def test_a_head_that_does_not_come_ends_the_connection(monkeypatch, pieces):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0)
    assert transport_after(*pieces, rounds=5).is_aborted


def test_a_request_that_has_come_may_take_its_time(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0)
    transport = transport_after(GET, rounds=5)
    assert not transport.is_aborted
    assert transport.sent.startswith(b"HTTP/1.1 200 OK")


def test_a_head_without_an_end_is_not_kept():
    line = b"x-" + b"x" * 20000 + b": y\r\n"
    assert not transport_after(b"GET / HTTP/1.1\r\n", *[line] * 3).is_aborted
    assert transport_after(b"GET / HTTP/1.1\r\n", *[line] * 4).is_aborted


def test_a_body_may_be_longer_than_a_head():
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n"
    assert not transport_after(head, b"x" * 50000, b"x" * 50000).is_aborted
