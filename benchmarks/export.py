"""A model's step compiled ahead of time, with the eager model's: one row, four rows, 8 requests, a prompt.

    OMP_NUM_THREADS=1 python benchmarks/export.py [MODEL] [--types sym_int4 q8_0 none] [--rounds 11]

The package is compiled in your cache directory where it is not there yet, which takes a minute or two for each type.
Both sides run the same packed steps of one runner, in turns, at a context of 256. `cpu` is the processor's time of one
thread, `wall` what a clock says; a ratio below 1 is the package's gain. `load_s` is what finding, opening and binding
the package take at each start, `load_cpu_s` the processor's part of it. Greedy tokens of a prompt are compared, and
logits. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from common.machine import machine
from common.timing import report, seconds

from llama import Llama, SamplingParams
from llama.cache import Span
from llama.compiled import choose_program
from llama.runner import Pack, Runner

CONTEXT = 256
STEPS = {  # of each request: rows, tokens before them
    "1 row": [(1, CONTEXT)],
    "4 rows": [(4, CONTEXT)],
    "8 requests": [(1, CONTEXT)] * 8,
    "prompt of 128": [(128, 0)],
}
ROOM = 2 * CONTEXT  # slots of each request
PROMPT = "The history of the city of Rome begins with"


def pack(parts: list[tuple[int, int]]) -> Pack:
    spans, wanted, first_row = [], [], 0
    for number, (num_rows, before) in enumerate(parts):
        spans.append(Span(first_row, num_rows, before + num_rows, ((number * ROOM, ROOM),)))
        first_row += num_rows
        wanted.append(first_row - 1)
    return Pack([(7 * row) % 1000 for row in range(first_row)], wanted, [], spans)


def compare(runner: Runner, sides: dict[str, object], step: Pack, rounds: int) -> dict[str, float]:
    """Milliseconds of a step on both sides, and the ratios."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, program in sides.items():
            runner.program = program
            clock, own = time.perf_counter(), time.thread_time()
            runner.run(step)
            if turn:  # the first is for warming up
                cpu[name].append(1000 * (time.thread_time() - own))
                wall[name].append(1000 * (time.perf_counter() - clock))
    row = {f"{name}_cpu_ms": round(median(times), 2) for name, times in cpu.items()}
    for kind, times in (("cpu", cpu), ("wall", wall)):
        row[f"{kind}_ratio"] = round(median(times["package"]) / median(times["eager"]), 3)
    row["cpu_ratio_of_minima"] = round(min(cpu["package"]) / min(cpu["eager"]), 3)
    return row


def measure(model: str | None, quantization: str, rounds: int) -> dict[str, object]:
    options = {"device": "cpu", "quantization": quantization, "max_seq_len": 8 * ROOM}
    compiling = seconds(lambda: Llama.build(model, compile=True, **options))
    llm = Llama.build(model, compile=True, **options)
    runner = llm.engine.runner
    kv_dtype = runner.cache.layers[0][0].numbers.dtype
    loads = []
    for _ in range(5):
        clock, own = time.perf_counter(), time.process_time()
        choose_program(llm.model, kv_dtype, True)
        loads.append((time.process_time() - own, time.perf_counter() - clock))
    sides = {"eager": llm.model, "package": runner.program}
    found: dict[str, object] = {"first_start_s": round(compiling, 1)}
    found["load_cpu_s"], found["load_s"] = (round(min(times), 4) for times in zip(*loads, strict=True))
    for name, parts in STEPS.items():
        found[name] = compare(runner, sides, pack(parts), rounds)
        print(f"{quantization:9} {name:14} {found[name]}", flush=True)
    answers, logits = {}, {}
    for name, program in sides.items():
        runner.program = program
        answers[name] = llm.complete([PROMPT], SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))[
            0
        ].tokens
        logits[name] = runner.run(pack(STEPS["prompt of 128"])).logits
    found["same_greedy_tokens"] = answers["eager"] == answers["package"]
    found["largest_difference_of_logits"] = float((logits["eager"] - logits["package"]).abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--types", nargs="+", default=["sym_int4", "q8_0", "none"])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.manual_seed(0)
    limits = machine()
    print(limits, flush=True)
    figures = {type: measure(options.model, type, options.rounds) for type in options.types}
    for type, found in figures.items():
        loading = f"load {found['load_s']} s ({found['load_cpu_s']} of the processor)"
        print(f"{type:9} {loading}, first start {found['first_start_s']} s", flush=True)
    report({"machine": limits, "figures": figures})


if __name__ == "__main__":
    main()
