"""A lean client of streamed answers: what it takes of the processor the server lacks."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Answer:
    """When each piece of an answer came, in seconds after it was asked for."""

    times: list[float] = field(default_factory=list)
    num_tokens: int = 0  # as the last chunk's usage has it
    status: int = 0

    @property
    def first(self) -> float:
        return self.times[0]


async def ask(url: str, path: str, body: dict) -> Answer:
    """POSTs a body and reads the server-sent events of the answer; pieces without text are not counted."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    answer, started = Answer(), time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    answer.status = int((await reader.readline()).split()[1])
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk.get("usage"):
            answer.num_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk.get("choices", ()):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                answer.times.append(time.perf_counter() - started)
    writer.close()
    return answer
