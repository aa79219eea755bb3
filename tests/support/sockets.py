"""Bytes to a server and back, for what no client would send."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from typing import Any

from support.server import Running


def connect(running: Running, **options: int) -> socket.socket:
    """A connection; options by their names, as SO_RCVBUF, are set before it is made."""
    client = socket.socket()
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    client.settimeout(60)
    client.connect((running.host, running.port))
    return client


def read_all(client: socket.socket) -> bytes:
    """Everything until the server closes the connection, in whatever way."""
    pieces = []
    try:
        while piece := client.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def exchange(running: Running, *pieces: bytes) -> bytes:
    """What the server says to these bytes until it closes the connection."""
    with connect(running) as client:
        for piece in pieces:
            try:
                client.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
        return read_all(client)


def request(
    line: str = "GET / HTTP/1.1", headers: Iterable[str] = ("Host: localhost",), body: bytes = b"", close: bool = True
) -> bytes:
    """A request as it is sent. `close` asks the server to close the connection behind its answer."""
    lines = [line, *headers, *(["Connection: close"] if close else [])]
    return "".join(f"{one}\r\n" for one in lines).encode("latin-1") + b"\r\n" + body


def post(path: str, body: bytes | Any, *headers: str) -> bytes:
    """A request with a body of JSON, or of these bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    own = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}")
    return request(f"POST {path} HTTP/1.1", (*own, *headers), data)


def status(answer: bytes) -> int | None:
    """That of the first answer; None where there is none."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.") else None


def error(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
