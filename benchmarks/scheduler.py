"""The scheduler alone: milliseconds of Python per step, and how whole the requests' blocks stay.

    python benchmarks/scheduler.py [--running 256] [--blocks 16384] [--steps 2000]

Chat-like requests come and go around a full house; tokens are appended without a model. The first half of
the steps fills the house and is not timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from llama.request import Request
from llama.scheduler import Scheduler


def run(num_running: int, num_blocks: int, num_steps: int, prefix_caching: bool) -> dict[str, float]:
    """Time schedule + advance + append + finish per step."""
    rng = random.Random(0)
    system_prompt = rng.choices(range(32000), k=200)
    scheduler = Scheduler(num_blocks, 16, 512, num_running, prefix_caching)
    ends: dict[Request, int] = {}  # when its answer is over: mostly well before max_total_tokens
    seconds: list[float] = []
    num_extents: list[int] = []
    for number in range(num_steps):
        while len(scheduler.waiting) < 4:
            prompt = system_prompt + rng.choices(range(32000), k=rng.randint(32, 512))
            request = Request(len(ends), prompt, len(prompt) + 512)
            ends[request] = len(prompt) + rng.randint(16, 512)
            scheduler.add(request)
        start = time.perf_counter()
        step = scheduler.schedule()
        scheduler.advance(step)
        for part in step.slices:
            request = part.request
            if part.num_sampled:
                scheduler.append(request, len(request.tokens))
                if len(request.tokens) == ends[request]:
                    scheduler.finish(request)
        if number >= num_steps // 2:
            seconds.append(time.perf_counter() - start)
            num_extents += [len(request.extents) for request in scheduler.running]
    return {
        "num_running": scheduler.stats().num_running,
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * statistics.quantiles(seconds, n=100)[98],
        "extents_per_request": statistics.mean(num_extents),
        "num_preemptions": scheduler.stats().num_preemptions,
    }


def time_hashing(num_tokens: int = 512) -> dict[str, float]:
    """What prefix caching costs a step that computes one new prompt: look-up (with hashing) and publishing."""
    scheduler = Scheduler(4096, 16, num_tokens)
    look_up, publish = [], []
    for number in range(200):
        request = Request(number, random.Random(number).choices(range(32000), k=num_tokens), num_tokens)
        start = time.perf_counter()
        scheduler.prefixes.match(request)
        look_up.append(time.perf_counter() - start)
        scheduler.add(request)
        step = scheduler.schedule()
        start = time.perf_counter()
        scheduler.advance(step)
        publish.append(time.perf_counter() - start)
        scheduler.finish(request)
    return {"look_up_ms": 1e3 * statistics.median(look_up), "publish_ms": 1e3 * statistics.median(publish)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    results = {
        "prefix caching": run(args.running, args.blocks, args.steps, prefix_caching=True),
        "no prefix caching": run(args.running, args.blocks, args.steps, prefix_caching=False),
        "a new prompt of 512": time_hashing(),
    }
    for name, result in results.items():
        print(f"{name:20} " + "  ".join(f"{key} {value:.3g}" for key, value in result.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
