"""Prefill and single-stream decode on the default model in bf16, beside transformers' eager mode.

    python benchmarks/transformers_eager.py [--rounds 7]

Both sides hold the same weights, get new prompts of 512 tokens, take the likeliest token and never stop early; they
run in turns. Decode is the time of 64 further tokens. Ratios above 1: this engine is faster.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import torch
from common.machine import machine
from common.timing import alternate, median, report, seconds

PROMPT = 512
DECODE = 64


def ours():
    from llama import Llama, SamplingParams

    llm = Llama.build(max_seq_len=1024, dtype="bf16", quantization="none")

    def run(prompt: list[int], num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        [completion] = llm.complete([prompt], params)
        assert len(completion.tokens) == num_tokens

    return run


def theirs(directory: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompt: list[int], num_tokens: int) -> None:
        tokens = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
        assert tokens.shape[1] == len(prompt) + num_tokens

    return run


def start_up() -> float:
    """Seconds from the start of a process to its first printed token."""
    command = [sys.executable, "-m", "llama", "complete", "--prompt", "Once upon a time", "--max-tokens", "1"]
    return seconds(lambda: subprocess.run(command, capture_output=True, check=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    from llama.checkpoint import convert, default_model

    with tempfile.TemporaryDirectory() as directory:
        convert(default_model(), Path(directory) / "hf", to="hf", dtype=torch.bfloat16)
        engines = {"llama": ours(), "transformers": theirs(Path(directory) / "hf")}
    seeds = count()

    def timed(num_tokens: int) -> dict[str, list[float]]:
        def side(run):
            prompt = torch.randint(100, 40000, (PROMPT,), generator=torch.Generator().manual_seed(next(seeds)))
            return seconds(lambda: run(prompt.tolist(), num_tokens))

        return alternate(rounds, **{name: partial(side, run) for name, run in engines.items()})

    prefill, whole = timed(1), timed(1 + DECODE)
    result: dict[str, object] = {"machine": machine()}
    for name in engines:
        first = median(prefill[name])
        result[name] = {
            "prefill_tokens_per_s": round(PROMPT / first),
            "decode_tokens_per_s": round(DECODE / (median(whole[name]) - first), 1),
        }
        print(name, result[name])
    for figure in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        result[figure.replace("tokens_per_s", "ratio")] = round(
            result["llama"][figure] / result["transformers"][figure], 2
        )
    result["start_to_first_token_s"] = round(median([start_up() for _ in range(5)]), 2)
    report(result)


if __name__ == "__main__":
    main()
