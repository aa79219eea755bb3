"""What the prefix cache saves where prompts begin alike, and what it costs where they do not.

    python benchmarks/prefix.py [--prompt 1600] [--rounds 9] [--requests 32]

Both on the default model in bfloat16. The first figure is the time to the first token of a prompt of which 90 % are in
the cache, over that of a prompt of the same length that is wholly new, in turns (at most 0.2 is wanted). The second is
the share of all steps' time that hashing, look-up and publishing take, while requests of which no two begin alike are
answered (at most 1 %); the time is taken around `PrefixCache.match` and `PrefixCache.publish`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from common.machine import machine
from common.timing import alternate, median, report, seconds
from common.works import add

from llama import Llama

SHARED = 0.9
TARGETS = {"first_token": 0.2, "share_of_step": 0.01}


class Timed:
    """A function, with the seconds that its calls have taken."""

    def __init__(self, function: Callable[..., object]):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: object) -> object:
        start = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - start
        return result


def tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(100, 40000), k=count)


def first_token_time(llm: Llama, prompt: list[int], num_cached: int) -> float:
    """Seconds from giving a prompt to its first token; `num_cached` of its tokens should be in the cache."""
    start = time.perf_counter()
    add(llm.engine, prompt, 1)
    [request] = llm.engine.scheduler.waiting
    while llm.engine.has_work:
        llm.engine.step()
    elapsed = time.perf_counter() - start
    assert request.num_cached_tokens == num_cached, f"{request.num_cached_tokens} tokens were found"
    return elapsed


def first_token(llm: Llama, length: int, rounds: int) -> dict[str, float]:
    """Milliseconds to the first token, with 90 % of the prompt cached and with none of it."""
    rng, block_size = random.Random(1), llm.engine.scheduler.block_size
    shared = tokens(rng, int(SHARED * length))
    num_cached = len(shared) // block_size * block_size
    first_token_time(llm, shared + tokens(rng, 1), 0)
    times = alternate(
        rounds,
        cached=lambda: first_token_time(llm, shared + tokens(rng, length - len(shared)), num_cached),
        uncached=lambda: first_token_time(llm, tokens(rng, length), 0),
    )
    return {name: round(1e3 * median(figures), 2) for name, figures in times.items()}


def share_of_step(llm: Llama, timed: list[Timed], num_requests: int) -> dict[str, float]:
    """How much of the steps' time the timed functions take, over requests with nothing in common."""
    rng, engine = random.Random(2), llm.engine
    for _ in range(num_requests):
        num_tokens = rng.randint(16, 64)
        add(engine, tokens(rng, rng.randint(32, 512)), num_tokens)
    before, steps = sum(function.seconds for function in timed), []
    while engine.has_work:
        steps.append(seconds(engine.step))
    hashing = sum(function.seconds for function in timed) - before
    return {"steps": len(steps), "step_ms": 1e3 * median(steps), "share": hashing / sum(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1600, help="tokens; best a multiple of 160")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=32)
    options = parser.parse_args()
    limits = machine()
    print(limits, flush=True)
    llm = Llama.build(max_seq_len=max(1024, options.prompt + 1), dtype="bf16")
    prefixes = llm.engine.scheduler.prefixes
    prefixes.match, prefixes.publish = Timed(prefixes.match), Timed(prefixes.publish)
    times = first_token(llm, options.prompt, options.rounds)
    ratio = times["cached"] / times["uncached"]
    print(
        f"first token of {options.prompt}: {times['cached']} ms cached, {times['uncached']} ms uncached: "
        f"{ratio:.3f} (target {TARGETS['first_token']})",
        flush=True,
    )
    cost = share_of_step(llm, [prefixes.match, prefixes.publish], options.requests)
    print(
        f"hashing and look-up: {cost['share']:.3%} of {cost['steps']} steps of {cost['step_ms']:.1f} ms "
        f"(target {TARGETS['share_of_step']:.0%})"
    )
    report(
        {
            "machine": limits,
            "prompt": options.prompt,
            "first_token_ms": times,
            "first_token_ratio": round(ratio, 3),
            "no_shared_prefix": {name: round(figure, 5) for name, figure in cost.items()},
            "targets": TARGETS,
        }
    )


if __name__ == "__main__":
    main()
