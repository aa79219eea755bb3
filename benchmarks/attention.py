"""Rows of one request through the compiled operator and in tiles: from how many rows on which is faster.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [--rounds 9] [--dtype fp32]

One layer's attention (rotate, store, attend) of one request whose last rows are the step, in both ways in turns, at the
shapes of SmolLM2 and of a model of 1.1B. Seconds are the processor's, of one thread. A figure is the operator's time
over the tiles', the median of the rounds: below 1 the operator is faster. `SHORT_SPAN` in `llama/attention.py` is
chosen from it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from common.machine import machine
from common.timing import alternate, median, report

from llama.attention import CompiledRows, StepCache, Tiles
from llama.cache import CacheShape, KVCache, Span
from llama.device import DTYPES
from llama.rotary import Rotary, rope_frequencies, turning_rates

SHAPES = {"SmolLM2": (9, 3, 64), "1.1B": (32, 4, 64)}  # heads, key heads, head_dim
ROWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (128, 512, 2048)
LEAST = 0.02  # seconds that one measurement takes at least


def attend_time(layer, qkv: torch.Tensor, rotary: Rotary, repeats: int) -> float:
    """Seconds of one thread for one call."""
    start = time.thread_time()
    for _ in range(repeats):
        layer.attend(qkv, rotary)
    return (time.thread_time() - start) / repeats


def ratio(shape: tuple[int, int, int], rows: int, context: int, dtype: torch.dtype, rounds: int) -> float:
    """The operator's time over the tiles'."""
    heads, kv_heads, head_dim = shape
    cache = KVCache(CacheShape(1, kv_heads, head_dim), context, torch.device("cpu"), dtype)
    for store in cache.layers[0]:
        store.numbers.normal_()
    positions = torch.arange(context - rows, context)
    rotary = Rotary.at(positions, turning_rates(rope_frequencies(head_dim, 10000.0, None)))
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim).to(dtype)
    spans = [Span(0, rows, context, ((0, context),))]
    sides = {}
    for name, plan in {"rows": partial(CompiledRows.plan, short=rows), "tiles": Tiles.plan}.items():
        [layer] = StepCache.of(cache, spans, plan)
        repeats = max(1, round(LEAST / attend_time(layer, qkv, rotary, 1)))
        sides[name] = partial(attend_time, layer, qkv, rotary, repeats)
    times = alternate(rounds, **sides)
    return median(times["rows"]) / median(times["tiles"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    limits = machine()
    print(limits, flush=True)
    torch.manual_seed(0)
    figures = {}
    for name, shape in SHAPES.items():
        for context in CONTEXTS:
            row = {
                rows: ratio(shape, rows, context, DTYPES[options.dtype], options.rounds)
                for rows in ROWS
                if rows <= context
            }
            figures[f"{name} {context}"] = row
            shown = "  ".join(f"{rows}: {value:.2f}" for rows, value in row.items())
            print(f"{name:8} context {context:4}: {shown}", flush=True)
    report({"machine": limits, "dtype": options.dtype, "ratios": figures})


if __name__ == "__main__":
    main()
