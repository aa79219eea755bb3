"""What `llama serve` does when it is treated badly: clients that leave, that are too many, a megabyte at once, signals.

    python benchmarks/serving_faults.py [lag | disconnects | queue | stops] [--stops 100] [--model DIR]

`lag`: while prompts of 1 MB are being tokenized, how late the event loop is (from /metrics) and how long /health takes.
`disconnects`: 200 clients leave at random moments, before the first byte, in the queue, in the prompt, in mid-answer;
what is held one second later. `queue`: 256 clients at once against a queue of 128; how many are answered, and how soon
the others are refused. `stops`: SIGTERM at random moments under load; whether every stream had an end, and the exit
status. All of them without an argument; the last line is JSON, and the exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from common.client import Client
from common.timing import report

WORDS = ("ship", "sailed", "past", "old", "grey", "tower", "rain", "fell", "on", "its", "many", "quiet", "windows")
NUM_DISCONNECTS, NUM_CLIENTS, QUEUE = 200, 256, 128
MOST_LAG, MOST_REFUSAL = 0.1, 1.0  # seconds


def text(chance: random.Random, num_words: int) -> str:
    return " ".join(chance.choices(WORDS, k=num_words))


def body(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": "m", "prompt": prompt, "ignore_eos": True, **fields}


@dataclass
class Server(Client):
    """A server in a process of its own."""

    process: asyncio.subprocess.Process

    async def metrics(self) -> dict[str, float]:
        """By name, and for histograms by name and bound."""
        _, content = await self.ask("GET", "/metrics")
        found = {}
        for name, labels, value in re.findall(r"^(llama_\w+)\{(.*)\} (\S+)$", content.decode(), re.MULTILINE):
            bound = re.search(r'le="([^"]+)"', labels)
            found[f"{name} {bound[1]}" if bound else name] = float(value)
        return found


@asynccontextmanager
async def serving(model: str | None, *options: str) -> AsyncIterator[Server]:
    command = [sys.executable, "-m", "llama", "serve", *([model] if model else []), "--port", "0", "--quiet", *options]
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    url = None
    while url is None:
        line = await process.stderr.readline()
        if not line:
            raise SystemExit(f"the server ended with status {await process.wait()}")
        match = re.search(rb"at (http://[^ ]+)", line)
        url = match and match[1].decode()
    try:
        yield Server(url, process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def lag(model: str | None) -> dict[str, object]:
    """Eight megabytes, two at a time."""
    async with serving(model) as server:
        chance = random.Random(0)
        megabyte = text(chance, 170_000)
        before, times = await server.metrics(), []
        tokenizing = asyncio.gather(*(tokenize(server, [megabyte] * 4) for _ in range(2)))
        while not tokenizing.done():
            started = time.perf_counter()
            await server.ask("GET", "/health")
            times.append(time.perf_counter() - started)
            await asyncio.sleep(0.01)
        statuses = Counter(status for some in tokenizing.result() for status in some)
        after = await server.metrics()
    counts = {
        float(name.split()[1]): after[name] - before.get(name, 0)
        for name in after
        if name.startswith("llama_event_loop_lag_seconds_bucket")
    }
    num = counts[float("inf")]
    p99 = min(bound for bound, count in counts.items() if count >= 0.99 * num)
    return {
        "prompt_bytes": len(megabyte),
        "statuses": statuses,
        "looks": num,
        "lag_p99_at_most_s": p99,
        "health_p99_s": round(quantile(times, 0.99), 4),
        "health_max_s": round(max(times), 4),
        "met": p99 <= MOST_LAG and set(statuses) == {400},  # more than the context holds, which only tokenizing shows
    }


async def tokenize(server: Server, prompts: list[str]) -> list[int]:
    return [(await server.ask("POST", "/v1/completions", body(prompt)))[0] for prompt in prompts]


async def disconnects(model: str | None) -> dict[str, object]:
    async with serving(model) as server:
        chance = random.Random(1)
        limit = asyncio.Semaphore(24)
        await asyncio.gather(*(leave(server, chance, limit) for _ in range(NUM_DISCONNECTS)))
        await asyncio.sleep(1)
        found = await server.metrics()
        status, _ = await server.ask("POST", "/v1/completions", body("ship", max_tokens=2))
    names = ("llama_num_requests_running", "llama_num_requests_waiting", "llama_kv_cache_usage_perc")
    held = {name: found[name] for name in names}
    return {"aborted": found["llama_aborted_total"], **held, "met": not any(held.values()) and status == 200}


async def leave(server: Server, chance: random.Random, limit: asyncio.Semaphore) -> None:
    """Asks, and is gone: at once, after a while without an answer, or after some of it."""
    stream, num_choices = chance.random() < 0.7, chance.choice([1, 3])
    patience = chance.choice([0, 0, chance.random() * 0.05, chance.random(), chance.random() * 3])
    async with limit:
        asked = body(text(chance, chance.randrange(1, 400)), max_tokens=400, stream=stream, n=num_choices)
        reader, writer = await server.send("POST", "/v1/completions", asked)
        try:
            async with asyncio.timeout(patience):
                await reader.read()
        except TimeoutError:
            pass
        if chance.random() < 0.5:
            writer.transport.abort()  # a reset, where closing says goodbye
        writer.close()


async def queue(model: str | None) -> dict[str, object]:
    async with serving(model, "--max-queue", str(QUEUE)) as server:

        async def one(number: int) -> tuple[int, float]:
            started = time.perf_counter()
            status, _ = await server.ask("POST", "/v1/completions", body(f"ship {number}", max_tokens=8))
            return status, time.perf_counter() - started

        answers = await asyncio.gather(*(one(number) for number in range(NUM_CLIENTS)))
    statuses = Counter(status for status, _ in answers)
    refused = [seconds for status, seconds in answers if status == 429]
    return {
        "statuses": statuses,
        "refused_after_at_most_s": round(max(refused, default=0.0), 3),
        "met": set(statuses) == {200, 429} and statuses[200] >= QUEUE and max(refused) < MOST_REFUSAL,
    }


async def stops(model: str | None, number: int) -> dict[str, object]:
    outcomes: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    for seed in range(number):
        chance = random.Random(seed)
        timeout = chance.choice(["0", "0.5", "30"])
        async with serving(model, "--shutdown-timeout", timeout) as server:
            streams = [asyncio.create_task(end_of(server, chance)) for _ in range(8)]
            await asyncio.sleep(chance.random() * 1.5)
            server.process.send_signal(signal.SIGTERM)
            outcomes.update(await asyncio.gather(*streams))
            statuses[await server.process.wait()] += 1
    return {
        "outcomes": outcomes,
        "exit_statuses": statuses,
        "met": set(statuses) == {0} and set(outcomes) <= {"whole", "cut off", "refused"},
    }


async def end_of(server: Server, chance: random.Random) -> str:
    """How a stream ended; it begins at a random moment, so that the signal may come before it."""
    asked = body(text(chance, 30), max_tokens=chance.randrange(1, 120), stream=True)
    await asyncio.sleep(chance.random())
    status, content = await server.ask("POST", "/v1/completions", asked)
    if status in (0, 503):
        return "refused"
    if not content.rstrip(b"\r\n0").endswith(b"data: [DONE]"):
        return f"status {status}, ends with {content[-60:]!r}"
    return "cut off" if b'data: {"error"' in content else "whole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["lag", "disconnects", "queue", "stops"])
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--model")
    given = parser.parse_args()
    works = {
        "lag": lambda: lag(given.model),
        "disconnects": lambda: disconnects(given.model),
        "queue": lambda: queue(given.model),
        "stops": lambda: stops(given.model, given.stops),
    }
    results = {name: asyncio.run(work()) for name, work in works.items() if given.what in (None, name)}
    for name, result in results.items():
        print(f"{name}: {'met' if result['met'] else 'MISSED'}")
    report(results)
    sys.exit(not all(result["met"] for result in results.values()))


if __name__ == "__main__":
    main()
