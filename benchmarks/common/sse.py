"""Streamed answers, and when their pieces come."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

from .http import Client


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
    reader, writer = await Client(url).send("POST", path, body)
    answer, started = Answer(), time.perf_counter()
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
