"""How fast answers come on a machine that others keep busy, beside the same machine left alone.

    python benchmarks/busy.py [MODEL] [--quantization sym_int4] [--others 2] [--rounds 5]

The script starts `--others` processes that do nothing but count, and takes turns: alone, beside them, alone ... They
are stopped in between by a signal. One answer of 32 tokens a turn; medians of a step's seconds. Where there are as
many others as processors a fair share is half of each, so that a ratio of 0.5 is what the system leaves; threads that
wait for one that is not scheduled make it far smaller. "steady" is the median step's ratio, "whole" that of all steps'
sum, in which single long waits count. The target is a quarter.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llama import Llama, SamplingParams  # before torch: it sets what threads do while they wait
from llama.answer import Query

import torch  # isort: skip
from common.timing import median, report  # isort: skip

NUM_TOKENS = 33
PROMPT_TOKENS = 32


@contextmanager
def others(count: int) -> Iterator[list[subprocess.Popen]]:
    """Processes that count for ever, stopped until somebody continues them."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        for process in running:
            process.send_signal(signal.SIGSTOP)
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def decode(llm: Llama) -> list[float]:
    """Seconds of each step of one answer."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True).resolve()
    prompt = torch.randint(3, llm.tokenizer.n_words, (PROMPT_TOKENS,)).tolist()
    engine, steps = llm.engine, []
    engine.add(Query(prompt, params))
    engine.step()
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--quantization", default="sym_int4")
    parser.add_argument("--others", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llm = Llama.build(options.model, quantization=options.quantization, draft="none", max_seq_len=1024)
    with others(options.others) as processes:
        decode(llm)  # to warm up
        steps: dict[str, list[float]] = {"alone": [], "beside": []}
        for _ in range(options.rounds):
            steps["alone"] += decode(llm)
            for process in processes:
                process.send_signal(signal.SIGCONT)
            steps["beside"] += decode(llm)
            for process in processes:
                process.send_signal(signal.SIGSTOP)
    load = os.getloadavg()[0]
    steady = median(steps["alone"]) / median(steps["beside"])
    whole = sum(steps["alone"]) / sum(steps["beside"])
    for side, seconds in steps.items():
        print(f"{side}: {1e3 * median(seconds):.1f} ms a step, {1e3 * max(seconds):.1f} ms the longest")
    print(f"of its speed alone: {steady:.2f} of the median step, {whole:.2f} of all; the machine's load was {load:.1f}")
    report(
        {
            "quantization": options.quantization,
            "threads": options.threads,
            "others": options.others,
            "rounds": options.rounds,
            "load": load,
            "step_ms_alone": 1e3 * median(steps["alone"]),
            "step_ms_beside": 1e3 * median(steps["beside"]),
            "longest_ms_alone": 1e3 * max(steps["alone"]),
            "longest_ms_beside": 1e3 * max(steps["beside"]),
            "steady": steady,
            "whole": whole,
        }
    )


if __name__ == "__main__":
    main()
