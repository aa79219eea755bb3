"""What guessing ahead brings where an answer repeats what is there, and what it costs where it does not.

    OMP_NUM_THREADS=1 python benchmarks/speculation.py [--model MODEL] [--quantization sym_int4 none] [--draft MODEL]
        [--works copy prose] [--tokens 60] [--rounds 5]

One stream, plain decoding and guessing in turns, on the same engine. Seconds are the processor's, of one thread, from
the first token of an answer to its last, so that a machine that is busy with others hardly counts. "copy" are texts
that stand there four times and have begun a fifth time, continued with the likeliest tokens; "prose" goes on from its
beginning at temperature 1, and repeats no more than that does. Each text's figure is the median over the rounds of
plain time over guessing time, and the last figures are those of all texts together; answers are compared token by
token. Wanted for copies: 2.5 where the low-bit kernels make a few rows nearly as cheap as one, 1.5 unpacked; for
prose 0.98. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from statistics import geometric_mean

import torch
from common.machine import machine
from common.timing import alternate, median, report

from llama import Llama, SamplingParams
from llama.answer import Query
from llama.speculation import Speculation

NOTICE = """The committee met on Tuesday to discuss the new bridge over the river. Engineers said that the old bridge, \
built in 1931, could no longer carry heavy trucks. A new one would cost forty million dollars and take three years. \
Residents of the eastern shore asked that the footpath stay open during construction, and the mayor promised that it \
would."""
CODE = """def average(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)

def largest(values):
    found = values[0]
    for value in values:
        if value > found:
            found = value
    return found"""
COPIES = [f"{text}\n\n" * 4 + text[:60] for text in (NOTICE, CODE)]  # a small model goes astray with fewer
PROSE = [
    "The keeper of the lighthouse had not slept for two nights, and when the storm came",
    "A rainbow is seen when the sun stands low behind us and",
]
TARGETS = {"copy, sym_int4": 2.5, "copy, none": 1.5, "prose": 0.98}


class Side:
    """One way to decode, on an engine that others share: what it has found out about steps stays its own."""

    def __init__(self, llm: Llama, speculation: Speculation):
        self.llm = llm
        self.speculation = speculation
        self.tokens: list[int] = []

    def answer(self, prompt: str, params: SamplingParams) -> float:
        """CPU seconds of a token, behind the first; the tokens are in `tokens`."""
        engine = self.llm.engine
        engine.speculation = self.speculation
        [tokens] = self.llm.prompt_tokens([prompt])
        engine.add(Query(tokens, params.resolve()))
        self.tokens, started = [], 0.0
        while engine.has_work:
            self.tokens += [event.token for event in engine.step() if event.token is not None]
            started = started or time.thread_time()
        return (time.thread_time() - started) / (len(self.tokens) - 1)

    @property
    def counts(self) -> tuple[int, int]:
        return self.speculation.num_accepted_tokens, self.speculation.num_draft_tokens


def measure(plain: Side, guessing: Side, prompt: str, params: SamplingParams, rounds: int) -> dict[str, object]:
    accepted, drafted = guessing.counts
    times = alternate(
        rounds, plain=lambda: plain.answer(prompt, params), guessing=lambda: guessing.answer(prompt, params)
    )
    ratios = [before / after for before, after in zip(times["plain"], times["guessing"], strict=True)]
    return {
        "ratio": round(median(ratios), 3),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "ms_per_token": {side: round(1e3 * median(figures), 2) for side, figures in times.items()},
        "accepted": guessing.counts[0] - accepted,
        "drafted": guessing.counts[1] - drafted,
        "tokens": len(plain.tokens),
        "same": plain.tokens == guessing.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--quantization", nargs="+", default=["sym_int4", "none"])
    parser.add_argument("--draft", default="lookup")
    parser.add_argument("--works", nargs="+", default=["copy", "prose"], choices=["copy", "prose"])
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    works = {
        "copy": (COPIES, SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)),
        "prose": (PROSE, SamplingParams(temperature=1.0, seed=7, max_tokens=options.tokens, ignore_eos=True)),
    }
    found: dict[str, dict[str, object]] = {}
    limits = machine()
    for quantization in options.quantization:
        llm = Llama.build(options.model, quantization=quantization, max_seq_len=2048, draft=options.draft)
        for work in options.works:
            prompts, params = works[work]
            plain, guessing = Side(llm, Speculation(None)), Side(llm, llm.engine.speculation)
            rows = [measure(plain, guessing, prompt, params, options.rounds) for prompt in prompts]
            together = geometric_mean([row["ratio"] for row in rows])
            for row in rows:
                print(f"{work}, {quantization}: {row}", flush=True)
            target = TARGETS.get(f"{work}, {quantization}", TARGETS.get(work))
            print(f"{work}, {quantization}: {together:.2f} of plain decoding's speed (target {target})", flush=True)
            found[f"{work}, {quantization}"] = {"together": round(together, 3), "texts": rows}
        llm.close()
    report({"machine": limits, "draft": options.draft, "results": found, "targets": TARGETS})


if __name__ == "__main__":
    main()
