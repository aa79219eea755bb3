"""A server that is used hard for a long time, and hurt on the way: is anything lost?

    python benchmarks/marathon.py [--minutes 60] [--ranks 2] [--model DIR] [--seed 0]

A supervisor here keeps `llama serve` running, under torchrun with `--ranks` above 1, and starts it again when it ends.
The model is a tiny random one unless `--model` names another, with room for few requests: answers are preempted.
Clients of this process ask it over HTTP, all the time:

    base       16 streams, one after the other each: plain, seeded, with stop strings, two answers, logprobs, a regular
               expression, a JSON schema, an adapter, read slowly; one in ten is left at a random moment
    bursts     64 more streams for half a minute, every four minutes
    canaries   five a minute: the same prompts, greedily; each answer is compared, token by token, with the first one

and in the first half of the time it is hurt in turns: a rank is stopped for five seconds and goes on (SIGSTOP), a rank
is killed, the whole server is killed (SIGKILL). After each kill the supervisor starts it again.

What must hold, and is printed with the rest as JSON: every stream has a terminal event, or a refusal with its status,
unless a kill fell into it; canaries never differ; at rest no block is referenced; in the second half the memory of the
server's processes grows by less than 1 MiB in ten minutes; after each kill it answers again within 30 seconds. Exit
status 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from common.client import Client
from common.timing import report

from llama.bench.machine import processor
from llama.bench.shapes import MODEL_SHAPES, write_model

BASE, BURST, BURST_EVERY, BURST_SECONDS = 16, 64, 240.0, 30.0
LEAVING = 0.1  # the share of streams that are left
CANARY_EVERY, CANARY_TOKENS = 12.0, 32
CANARIES = ("Once upon a time", "The weather of tomorrow", "abc abc abc", "Dear reader,", "0 1 1 2 3 5 8")
STOPPED_SECONDS, MOST_RECOVERY = 5.0, 30.0
MOST_SLOPE, LEAST_MINUTES = 1.0, 10.0  # MiB in ten minutes; in a shorter time it says nothing
HARMLESS = ("whole", "left", "refused", "killed", "found nobody")  # what may become of a stream
HURT = ("stop a rank", "kill a rank", "kill the server")
MEMORY = "1MiB"  # for keys and values of the tiny model: 64 blocks
LONGEST = 512  # tokens of a prompt and its answer
ADAPTER = "small"


def words(chance: random.Random, count: int) -> str:
    return " ".join("".join(chance.choices("abcdefghij", k=chance.randint(1, 6))) for _ in range(count))


KINDS = {  # what a request may ask for beside its prompt
    "plain": {},
    "seeded": {"seed": 7, "temperature": 1.0},
    "stop": {"stop": ["e", "zz"]},
    "two answers": {"n": 2},
    "logprobs": {"logprobs": 3},
    "expression": {"structured_outputs": {"regex": "[a-z]{3,12}( [a-z]{1,8}){2,6}"}},
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "s",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
                    "required": ["a", "b"],
                    "additionalProperties": False,
                },
            },
        }
    },
    "adapter": {"model": ADAPTER},
    "slow reader": {},
}


@dataclass
class Supervisor:
    """Keeps a server running, in processes that it knows."""

    model: Path
    adapter: Path
    ranks: int
    log: Path
    port: int = 0
    process: subprocess.Popen | None = None
    kills: list[float] = field(default_factory=list)  # when the server was killed
    recoveries: list[float] = field(default_factory=list)  # seconds until it answered again
    starts: int = 0
    over: bool = False

    def start(self) -> None:
        command = [sys.executable, "-m"]
        if self.ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                rendezvous = f"--master-port={free.getsockname()[1]}"
            command += ["torch.distributed.run", f"--nproc-per-node={self.ranks}", rendezvous, "-m"]
        command += ["llama", "serve", str(self.model), "--port", str(self.port), "--quiet", "--max-queue", "256"]
        command += ["--device", "cpu", "--dtype", "fp32", "--max-seq-len", str(LONGEST), "--kv-cache-memory", MEMORY]
        command += ["--lora", f"{ADAPTER}={self.adapter}", "--rank-timeout", "20"]
        with self.log.open("ab") as log:
            threads = {"OMP_NUM_THREADS": "1"} if self.ranks > 1 else {}
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | threads, start_new_session=True
            )
        self.starts += 1

    async def keep(self, client: Watched) -> None:
        """Starts the server whenever it has ended, and measures how long it takes to answer."""
        while not self.over:
            if self.process is None or self.process.poll() is not None:
                ended = self.kills[-1] if self.is_recovering else None
                self.start()
                while not self.over and not await client.is_healthy():
                    await asyncio.sleep(0.1)
                    if self.process.poll() is not None:
                        break
                else:
                    if ended is not None:
                        self.recoveries.append(time.monotonic() - ended)
            await asyncio.sleep(0.1)

    @property
    def is_recovering(self) -> bool:
        return len(self.recoveries) < len(self.kills)

    def members(self) -> list[int]:
        """Process ids of the ranks, or of the one server; torchrun's own is not one of them."""
        if self.process is None or self.process.poll() is not None:
            return []
        if self.ranks == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def memory(self) -> float:
        """MiB of anonymous memory that the ranks hold together."""
        total = 0
        for pid in self.members():
            with suppress(FileNotFoundError, ProcessLookupError):
                found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                total += int(found[1]) if found else 0
        return total / 1024

    def descriptors(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.members())

    def kill(self, everything: bool, chance: random.Random) -> None:
        members = self.members()  # which torchrun gives sessions of their own, and nobody knows when it is gone
        self.kills.append(time.monotonic())
        if everything:
            os.killpg(self.process.pid, signal.SIGKILL)
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            os.kill(chance.choice(members), signal.SIGKILL)

    async def end(self) -> int:
        self.over = True
        os.kill(self.members()[0], signal.SIGTERM)  # torchrun itself would end with a status of its own
        return await asyncio.to_thread(self.process.wait, 60)


class Watched(Client):
    """The server, asked how it is. Raises TimeoutError where it does not answer in a minute."""

    async def ask(self, method: str, path: str, data: object = None) -> tuple[int, bytes]:
        async with asyncio.timeout(60):
            return await super().ask(method, path, data)

    async def is_healthy(self) -> bool:
        with suppress(TimeoutError):
            return (await self.ask("GET", "/health"))[0] == 200
        return False

    async def metric(self, name: str) -> float | None:
        _, content = await self.ask("GET", "/metrics")
        found = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", content.decode(), re.MULTILINE)
        return float(found[1]) if found else None


@dataclass
class Marathon:
    """What the clients do, and what they found."""

    supervisor: Supervisor
    client: Watched
    chance: random.Random
    begins: float
    ends: float
    streams: Counter[str] = field(default_factory=Counter)  # by what became of them
    kinds: Counter[str] = field(default_factory=Counter)
    first_tokens: list[tuple[float, float]] = field(default_factory=list)  # when asked, seconds
    expected: dict[str, str] = field(default_factory=dict)
    canaries: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, float]] = field(default_factory=list)  # when, MiB
    hurts: Counter[str] = field(default_factory=Counter)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.ends

    def was_killed_since(self, began: float) -> bool:
        return any(kill >= began - 1 for kill in self.supervisor.kills)

    def request(self) -> tuple[str, dict[str, object]]:
        kind = self.chance.choice(list(KINDS))
        body = {"model": "default", "prompt": words(self.chance, self.chance.randint(5, 60)), "stream": True}
        body |= {"max_tokens": self.chance.randint(1, 100), "stream_options": {"include_usage": True}}
        return kind, body | KINDS[kind]

    async def stream(self) -> None:
        """One request from its beginning to its end, however that comes."""
        kind, body = self.request()
        self.kinds[kind] += 1
        leaves_after = self.chance.random() * 1.5 if self.chance.random() < LEAVING else None
        began = time.monotonic()
        try:
            async with asyncio.timeout(leaves_after or 300):
                outcome = await self.read(kind, body, began)
        except TimeoutError:
            outcome = "left" if leaves_after is not None else "hung"
        except ConnectionRefusedError:
            outcome = "found nobody" if self.supervisor.is_recovering else "connection lost"
        except OSError:
            outcome = "connection lost"
        if outcome not in HARMLESS and self.was_killed_since(began):  # also those that were told of it, as an error
            outcome = "killed"
        self.streams[outcome] += 1
        if outcome not in ("whole", "left"):
            await asyncio.sleep(0.5)

    async def read(self, kind: str, body: dict[str, object], began: float) -> str:
        reader, writer = await self.client.send("POST", "/v1/completions", body)
        try:
            head = await reader.readline()
            if not head:
                return "connection lost"
            status = int(head.split()[1])
            if status != 200:
                return "refused" if status in (429, 503) else f"status {status}"
            outcome, has_begun = "truncated", False
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                if not has_begun:
                    has_begun = True
                    self.first_tokens.append((began, time.monotonic() - began))
                if line.startswith(b'data: {"error"'):
                    outcome = "ended with an error"
                elif line.startswith(b"data: [DONE]") and outcome == "truncated":
                    outcome = "whole"
                if kind == "slow reader":
                    await asyncio.sleep(0.02)
            return outcome
        finally:
            writer.close()

    async def base(self) -> None:
        while not self.is_over:
            await self.stream()

    async def bursts(self) -> None:
        async def until(ends: float) -> None:
            while time.monotonic() < ends:
                await self.stream()

        while not self.is_over:
            await asyncio.sleep(min(BURST_EVERY, (self.ends - self.begins) / 4))
            ends = min(self.ends, time.monotonic() + BURST_SECONDS)
            await asyncio.gather(*(until(ends) for _ in range(BURST)))

    async def watch_canaries(self) -> None:
        while not self.is_over:
            for prompt in CANARIES:
                began = time.monotonic()
                found = await self.canary(prompt)
                if found is None:
                    self.canaries["killed" if self.was_killed_since(began - MOST_RECOVERY) else "failed"] += 1
                else:
                    same = found == self.expected.setdefault(prompt, found)
                    self.canaries["same" if same else "different"] += 1
                await asyncio.sleep(CANARY_EVERY)

    async def canary(self, prompt: str) -> str | None:
        """The ids of a greedy answer, as the server tells them."""
        body = {"model": "default", "prompt": prompt, "temperature": 0, "max_tokens": CANARY_TOKENS, "ignore_eos": True}
        with suppress(TimeoutError):
            status, content = await self.client.ask("POST", "/v1/completions", body | {"return_token_ids": True})
            if status == 200:
                return json.dumps(json.loads(content)["choices"][0]["token_ids"])
        return None

    async def hurt(self) -> None:
        """In turns, in the first half, at least twice each where there is time."""
        half = (self.ends - self.begins) / 2
        kinds = [kind for kind in HURT if self.supervisor.ranks > 1 or kind == "kill the server"]
        pause = half / (2 * len(kinds) + 1)
        while time.monotonic() + pause < self.begins + half:
            await asyncio.sleep(pause)
            kind = kinds[sum(self.hurts.values()) % len(kinds)]
            if not self.supervisor.members() or not await self.client.is_healthy():
                continue
            self.hurts[kind] += 1
            if kind == "stop a rank":
                pid = self.chance.choice(self.supervisor.members())
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(STOPPED_SECONDS)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            else:
                self.supervisor.kill(kind == "kill the server", self.chance)

    async def sample(self) -> None:
        while not self.is_over:
            self.samples.append((time.monotonic(), self.supervisor.memory()))
            await asyncio.sleep(2)

    async def run(self) -> None:
        clients = [self.base() for _ in range(BASE)]
        await asyncio.gather(*clients, self.bursts(), self.watch_canaries(), self.hurt(), self.sample())

    def slope(self) -> float:
        """MiB in ten minutes, over the second half: a line through the medians of its tenths."""
        half = [one for one in self.samples if one[0] > (self.begins + self.ends) / 2]
        parts = [part for part in np.array_split(np.array(half), 10) if len(part)]
        times, sizes = ([median(part[:, column]) for part in parts] for column in range(2))
        return float(np.polyfit(times, sizes, 1)[0] * 600)

    def late_first_tokens(self) -> tuple[float, float]:
        """The 95th percentile of the seconds to the first token, in the first quarter and in the last."""
        quarter = (self.ends - self.begins) / 4
        first = [seconds for at, seconds in self.first_tokens if at < self.begins + quarter]
        last = [seconds for at, seconds in self.first_tokens if at > self.ends - quarter]
        return tuple(float(np.quantile(some, 0.95)) if some else 0.0 for some in (first, last))


async def at_rest(client: Watched) -> dict[str, float | None]:
    """What is held when nobody asks any more; waits a few seconds for what was left."""
    for _ in range(50):
        used = await client.metric("vllm:kv_cache_usage_perc")
        running = await client.metric("vllm:num_requests_running")
        if used == 0 and running == 0:
            break
        await asyncio.sleep(0.2)
    return {"kv_cache_usage": used, "requests_running": running}


async def run(model: Path, adapter: Path, ranks: int, minutes: float, seed: int, log: Path) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Watched(f"http://127.0.0.1:{port}")
    supervisor = Supervisor(model, adapter, ranks, log, port)
    keeping = asyncio.create_task(supervisor.keep(client))
    while not await client.is_healthy():
        await asyncio.sleep(0.2)
        if supervisor.starts > 3:
            raise SystemExit(f"the server does not start: {log.read_text()[-500:]}")
    before = supervisor.descriptors()
    began = time.monotonic()
    marathon = Marathon(supervisor, client, random.Random(seed), began, began + 60 * minutes)
    await marathon.run()
    rest = await at_rest(client)
    preemptions, descriptors = await client.metric("vllm:num_preemptions_total"), supervisor.descriptors()
    status = await supervisor.end()
    await keeping
    bad = {name: count for name, count in marathon.streams.items() if name not in HARMLESS}
    first, last = marathon.late_first_tokens()
    holds = {
        "no stream without an end": not bad,
        "canaries never differ": not marathon.canaries["different"] and not marathon.canaries["failed"],
        "nothing is held at rest": rest == {"kv_cache_usage": 0, "requests_running": 0},
        "it recovers in time": max(supervisor.recoveries, default=0) < MOST_RECOVERY and not supervisor.is_recovering,
        "it ends when it is told to": status == 0,
    }
    if minutes >= LEAST_MINUTES:
        holds["memory does not grow"] = marathon.slope() < MOST_SLOPE
    return {
        "processor": processor(),
        "minutes": minutes,
        "ranks": ranks,
        "streams": dict(marathon.streams),
        "kinds": dict(marathon.kinds),
        "canaries": dict(marathon.canaries),
        "hurts": dict(marathon.hurts),
        "recoveries_s": [round(seconds, 1) for seconds in supervisor.recoveries],
        "preemptions": preemptions,
        "memory_MiB": [
            round(size, 1) for _, size in (marathon.samples[len(marathon.samples) // 2], marathon.samples[-1])
        ],
        "slope_MiB_per_10_min": round(marathon.slope(), 2),
        "first_token_p95_s": [round(first, 2), round(last, 2)],
        "descriptors": [before, descriptors],
        "at_rest": rest,
        "exit_status": status,
        "holds": holds,
    }


def write_adapter(path: Path, model: Path) -> None:
    """A random LoRA adapter of rank 4 on the queries, in PEFT's layout."""
    import torch
    from safetensors.torch import save_file

    from llama.checkpoint import open_checkpoint

    args, generator = open_checkpoint(model).args, torch.Generator().manual_seed(1)
    path.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(args.n_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, args.dim, generator=generator) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(args.n_heads * args.head_dim, 4, generator=generator) * 0.1
    save_file(tensors, path / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a checkpoint; a tiny random one if left out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llama-marathon-") as name:
        folder = Path(name)
        model = options.model or folder / "model"
        if options.model is None:
            write_model(model, MODEL_SHAPES["tiny"])
        write_adapter(folder / "adapter", model)
        log = folder / "server.log"
        result = asyncio.run(run(model, folder / "adapter", options.ranks, options.minutes, options.seed, log))
        if not all(result["holds"].values()):
            print(log.read_text()[-4000:], file=sys.stderr)
    for name, value in result.items():
        print(f"{name:22} {value}")
    report(result)
    sys.exit(not all(result["holds"].values()))


if __name__ == "__main__":
    main()
