"""What memory a process keeps when its model is switched: two ways to hold one model, in turns, six switches.

    OMP_NUM_THREADS=1 python benchmarks/switch.py [--model MODEL] [--switches 6] [--quantizations none sym_int4]

Each model answers before the next one takes its place, as in a server, by the same `ModelHolder`. A figure is the
process' resident memory once the model has answered, in MiB; what is mapped from files counts apart. The aim: after six
switches at most 5 % more than after two, which is the same model again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from common.machine import machine

from llama import Llama, SamplingParams
from llama.device import return_memory
from llama.server.holder import ModelHolder

PARAMS = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
PROMPTS = ["The capital of France is", "Once upon a time", "A long list of animals: " + "cat, dog, " * 100]
KV_CACHE_MEMORY = 64 << 20
MOST_GROWTH = 1.05


def resident() -> dict[str, float]:
    """MiB of this process, of its own and of mapped files."""
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def answered(holder: ModelHolder, quantization: str, model: str | None) -> dict[str, float]:
    """Resident memory once the model of a quantization has answered."""
    holder.build(model or "", {"quantization": quantization})
    holder.llm.complete(PROMPTS, PARAMS)
    return_memory()
    return resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; the default model if left out")
    parser.add_argument("--switches", type=int, default=6)
    parser.add_argument("--quantizations", nargs=2, default=["none", "sym_int4"])
    given = parser.parse_args()

    def make(path: str, options: dict[str, Any]) -> Llama:
        return Llama.build(path or None, max_seq_len=1024, device="cpu", kv_cache_memory=KV_CACHE_MEMORY, **options)

    holder, found = ModelHolder(make), []
    before = resident()
    for number in range(given.switches + 1):
        quantization = given.quantizations[number % 2]
        found.append(answered(holder, quantization, given.model))
        print(f"after {number} switches, {quantization}:", *(f"{n} {v:.0f}" for n, v in found[-1].items()), flush=True)
    holder.close()
    after = resident()
    print("imports:", *(f"{n} {v:.0f}" for n, v in before.items()))
    print("closed:", *(f"{n} {v:.0f}" for n, v in after.items()))
    growth = found[-1]["RssAnon"] / found[2]["RssAnon"]
    print(f"after {given.switches} switches {growth:.3f} of what it was after 2; the aim is at most {MOST_GROWTH}")
    print(json.dumps({"machine": machine(), "growth": growth, "resident": found, "closed": after, "imports": before}))


if __name__ == "__main__":
    main()
