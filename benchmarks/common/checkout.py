"""The default model under the package on PYTHONPATH, measured step by step: a child process that speaks JSON lines.

It uses only what older and newer checkouts share: `Llama.build`, `complete`, `engine.step`. One request a line on
standard input, one answer a line on standard output:

    {"build": "none", "threads": 1}  ->  {"package": "/path/llama/__init__.py", "build_s": 1.2}
    {"model": "none", "prompts": [[1, 2], ...], "num_tokens": 16, "skip": 0}
        ->  {"wall": 0.012, "cpu": 0.012, "tokens": [...]}

"build" and "model" are what `Llama.build` takes as `quantization`; each is built once. The answer's seconds are the
median of the engine's steps without the first `skip`, or the sum of all steps where `skip` is null.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from statistics import median

import torch

import llama
from llama import Llama, SamplingParams


class Steps:
    """An engine's `step`, with the seconds of wall clock and processor that each call took."""

    def __init__(self, step: Callable[[], object]):
        self.step = step
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> object:
        wall, cpu = time.perf_counter(), time.process_time()
        events = self.step()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return events


def build(quantization: str) -> Llama:
    return Llama.build(max_seq_len=1024, max_batch_size=32, device="cpu", quantization=quantization)


def run(llm: Llama, prompts: list[list[int]], num_tokens: int, skip: int | None) -> dict[str, object]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    steps = llm.engine.step = Steps(type(llm.engine).step.__get__(llm.engine))
    answers = llm.complete(prompts, params)
    if not steps.wall:
        raise RuntimeError("this checkout's engine does not run by `step`")
    figures = {"wall": steps.wall, "cpu": steps.cpu}
    if skip is None:
        taken = {name: sum(found) for name, found in figures.items()}
    else:
        taken = {name: median(found[skip:]) for name, found in figures.items()}
    return {**taken, "tokens": [answer.tokens for answer in answers]}


def main() -> None:
    """Answer requests until standard input ends."""
    models: dict[str, Llama] = {}
    for line in sys.stdin:
        request = json.loads(line)
        with redirect_stdout(sys.stderr):
            if "build" in request:
                torch.set_num_threads(request["threads"])
                started = time.perf_counter()
                models[request["build"]] = build(request["build"])
                answer = {"package": llama.__file__, "build_s": time.perf_counter() - started}
            else:
                answer = run(models[request.pop("model")], **request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
