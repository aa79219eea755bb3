"""A lean client of a server: what it takes of the processor the server lacks."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Client:
    """Requests, each on a connection of its own."""

    url: str

    async def send(
        self, method: str, path: str, data: object = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which a request was sent, and nothing read yet."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24)
        content = b"" if data is None else json.dumps(data).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        return reader, writer

    async def ask(self, method: str, path: str, data: object = None) -> tuple[int, bytes]:
        """Status and body; status 0 where the connection ended without an answer."""
        try:
            reader, writer = await self.send(method, path, data)
            answer = await reader.read()
        except OSError:
            return 0, b""
        writer.close()
        head, _, content = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else 0), content
