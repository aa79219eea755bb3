"""The scheduler alone: milliseconds of Python per step, and how whole the requests' blocks stay.

    python benchmarks/scheduler.py [--running 256] [--blocks 16384] [--steps 2000]

Requests of mixed lengths come and go around a full house, with sampled tokens appended and no model. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from llama.scheduler import Request, Scheduler


def make_request(number: int, rng: random.Random, system_prompt: list[int]) -> tuple[Request, int]:
    """A chat-like request, and the length at which it will end: often well before max_total_tokens."""
    prompt = system_prompt + [rng.randrange(32000) for _ in range(rng.randint(32, 512))]
    num_generated = rng.randint(16, 512)
    return Request(number, prompt, len(prompt) + 512), len(prompt) + num_generated


def run(num_running: int, num_blocks: int, num_steps: int, prefix_caching: bool) -> dict[str, float]:
    rng = random.Random(0)
    system_prompt = [rng.randrange(32000) for _ in range(200)]
    scheduler = Scheduler(num_blocks, 16, 512, num_running, prefix_caching)
    ends: dict[Request, int] = {}
    num_requests, seconds, prefill_tokens, num_extents = 0, [], 0, []
    for step_number in range(num_steps):
        while len(scheduler.waiting) < 4:
            request, end = make_request(num_requests, rng, system_prompt)
            ends[request] = end
            num_requests += 1
            scheduler.add(request)
        started = time.perf_counter()
        step = scheduler.schedule()
        scheduler.advance(step)
        for part in step.slices:
            request = part.request
            if part.samples:
                scheduler.append(request, len(request.tokens) % 32000)
                if len(request.tokens) >= ends[request]:
                    scheduler.finish(request)
        seconds.append(time.perf_counter() - started)
        prefill_tokens += sum(part.count for part in step.slices if part.count > 1)
        if step_number % 50 == 0:
            num_extents += [len(request.extents) for request in scheduler.running]
    half = seconds[num_steps // 2 :]  # the house is full by then
    stats = scheduler.stats()
    return {
        "num_running": stats.num_running,
        "median_ms": 1e3 * statistics.median(half),
        "p99_ms": 1e3 * sorted(half)[len(half) * 99 // 100],
        "extents_per_request": statistics.mean(num_extents),
        "prompt_tokens_per_step": prefill_tokens / num_steps,
        "num_preemptions": stats.num_preemptions,
        "num_requests": num_requests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    results = {}
    for name, prefix_caching in (("prefix cache", True), ("no prefix cache", False)):
        result = results[name] = run(args.running, args.blocks, args.steps, prefix_caching)
        print(f"{name:16} " + "  ".join(f"{key} {value:.4g}" for key, value in result.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
