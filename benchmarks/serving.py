"""What HTTP costs, and how soon an answer begins: `llama serve` beside its own engine, and beside transformers'.

    python benchmarks/serving.py throughput [--streams 8] [--rounds 5]
    python benchmarks/serving.py latency --peer-python /path/to/venv-with-transformers-serving/bin/python

`throughput`: the same prompts answered by so many streams over HTTP and by `Llama.complete` in this process, in turns;
generated tokens a second, and the ratio.

`latency`: chats that arrive at random (a Poisson process of one seed, the same for both) at 70 % of what the slower of
the two servers can answer, found beforehand with eight streams that never pause: the time to the first token. The
servers take turns, so that each has the machine to itself. The model is the default one, unpacked and converted for
transformers; every answer has as many tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from common.machine import processor
from common.sse import Answer, ask
from common.timing import alternate, median, report

from llama import Llama, SamplingParams
from llama.checkpoint import convert, default_model

WORDS = ("ship", "sailed", "past", "old", "grey", "tower", "rain", "fell", "on", "its", "many", "quiet", "windows")
TARGETS = {"throughput": 0.95, "latency": 0.5}


def prompt(number: int, num_words: int = 48) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=num_words))


@contextmanager
def served(command: list[str], url: str | None = None) -> Iterator[str]:
    """A server in a process of its own; the address that it prints, or `url` once anything answers there."""
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stderr=told, stdout=subprocess.DEVNULL)
        try:
            while not answers(url):
                time.sleep(0.2)
                if process.poll() is not None:
                    raise SystemExit(f"{command} ended with status {process.returncode}")
                told.seek(0)
                match = re.search(r"at (http://\S+)", told.read())
                url = url or (match and match[1])
            yield url
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str | None) -> bool:
    try:
        urlopen(f"{url}/v1/models", timeout=10).close()
    except HTTPError:  # an answer, too
        return True
    except (OSError, ValueError):
        return False
    return True


def own_server(*options: str) -> list[str]:
    return [sys.executable, "-m", "llama", "serve", "--port", "0", *options]


async def together(url: str, bodies: list[dict], path: str = "/v1/completions") -> list[Answer]:
    return await asyncio.gather(*(ask(url, path, body) for body in bodies))


def throughput(num_streams: int, num_tokens: int, rounds: int) -> dict:
    """Tokens a second over HTTP, as a share of the engine's own."""
    llm = Llama.build(device="cpu")
    prompts = [prompt(i) for i in range(num_streams)]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)

    def direct() -> float:
        started = time.perf_counter()
        answers = llm.complete(prompts, params)
        return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - started)

    with served(own_server("--device", "cpu")) as url:
        bodies = [
            {
                "model": "default",
                "prompt": text,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for text in prompts
        ]

        def over_http() -> float:
            started = time.perf_counter()
            answers = asyncio.run(together(url, bodies))
            return sum(answer.num_tokens for answer in answers) / (time.perf_counter() - started)

        figures = alternate(rounds, direct=direct, http=over_http)
    rates = {name: median(found) for name, found in figures.items()}
    ratio = median(h / d for h, d in zip(figures["http"], figures["direct"], strict=True))
    share = f"{ratio:.3f} (target {TARGETS['throughput']})"
    print(f"direct {rates['direct']:.0f} tokens/s, over HTTP {rates['http']:.0f}: {share}")
    return {**rates, "ratio": ratio}


def chat_body(number: int, model: str, num_tokens: int) -> dict:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
    }


async def capacity(url: str, model: str, num_tokens: int, num_requests: int) -> float:
    """Requests a second that are answered for eight clients who never pause."""
    numbers = iter(range(num_requests))

    async def client() -> None:
        for number in numbers:
            await ask(url, "/v1/chat/completions", chat_body(1000 + number, model, num_tokens))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(8)))
    return num_requests / (time.perf_counter() - started)


async def arrivals(url: str, model: str, num_tokens: int, rate: float, num_requests: int, seed: int) -> list[float]:
    """The times to the first token of chats that arrive at random, `rate` a second."""
    dice = random.Random(seed)
    tasks = []
    for number in range(num_requests):
        await asyncio.sleep(dice.expovariate(rate))
        body = chat_body(seed * 10_000 + number, model, num_tokens)
        tasks.append(asyncio.create_task(ask(url, "/v1/chat/completions", body)))
    return [answer.first for answer in await asyncio.gather(*tasks) if answer.times]


def latency(peer_python: str, num_tokens: int, num_requests: int, rounds: int, port: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "smollm2")
        convert(default_model(), model, "hf")
        peer = [peer_python, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port)]
        peer += ["--continuous-batching", "--device", "cpu"]
        rates: dict[str, float] = {}
        times: dict[str, list[list[float]]] = {"llama": [], "transformers": []}
        with (
            served(own_server(str(model), "--device", "cpu")) as url,
            served(peer, f"http://127.0.0.1:{port}") as other,
        ):
            sides = {"llama": url, "transformers": other}
            for name, where in sides.items():
                asyncio.run(capacity(where, str(model), num_tokens, 8))  # warm
                rates[name] = asyncio.run(capacity(where, str(model), num_tokens, num_requests // 2))
                print(f"{name} answers {rates[name]:.2f} requests/s")
            rate = 0.7 * min(rates.values())
            for round in range(rounds):
                for name, where in sides.items():
                    found = asyncio.run(arrivals(where, str(model), num_tokens, rate, num_requests, round))
                    times[name].append(found)
                    print(f"{name} first token after {median(found) * 1000:.0f} ms at {rate:.2f} requests/s")
    middle = {name: median(median(found) for found in runs) for name, runs in times.items()}
    ratio = middle["llama"] / middle["transformers"]
    print(f"ratio {ratio:.2f} (target {TARGETS['latency']})")
    return {"capacity": rates, "rate": rate, "first_token_s": middle, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "latency"])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--requests", type=int, default=40, help="of a round of latency")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-port", type=int, default=8765)
    args = parser.parse_args()
    if args.what == "throughput":
        result = throughput(args.streams, args.tokens, args.rounds)
    else:
        result = latency(args.peer_python, args.tokens, args.requests, args.rounds, args.peer_port)
    report({"machine": processor(), args.what: result})


if __name__ == "__main__":
    main()
