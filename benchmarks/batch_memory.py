"""Memory of a batch job: how far it grows from line to line. It should not: a job holds what is on its way.

    python benchmarks/batch_memory.py [--lines 20000]

A tiny random model answers a file of completions with logprobs, chats, embeddings and lines that fail. After a tenth of
them (all blocks of the cache have been written to, the allocator has its pages) the anonymous resident memory is taken
every hundredth, and a line is put through the figures. Linux only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import linear_regression

from common.machine import anonymous_bytes
from common.shapes import write_model
from common.timing import report
from sentencepiece import SentencePieceTrainer

from llama import Llama
from llama.batch import Batch, Counts
from llama.model import ModelArgs

MODEL = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=400)
TARGET = 128  # bytes a line: fingerprints take 24, and over 18,000 lines a swing of 2 MiB looks like 110


def write_tokenizer(path: Path) -> None:
    """A few hundred tokens: time goes into the job's own work."""
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["the job holds what is on its way"] * 9),
            model_writer=file,
            model_type="bpe",
            vocab_size=MODEL.vocab_size,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )


def write_requests(path: Path, num_lines: int) -> None:
    rng = random.Random(0)
    with open(path, "w") as file:
        for number in range(num_lines):
            prompt = rng.choices(range(3, 259), k=rng.randint(8, 40))
            url, body = {
                0: ("completions", {"prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 5}),
                1: (
                    "chat/completions",
                    {
                        "messages": [{"role": "user", "content": f"{prompt}"}],
                        "max_tokens": 2,
                        "temperature": 0,
                    },
                ),
                2: ("embeddings", {"input": prompt}),
                3: (
                    "completions",
                    {"prompt": [] if number % 20 == 3 else prompt, "max_tokens": 1, "temperature": 0},
                ),
            }[number % 4]
            entry = {"custom_id": f"request-{number}", "method": "POST", "url": f"/v1/{url}", "body": body}
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=20_000)
    num_lines = parser.parse_args().lines
    marks: dict[int, int] = {}  # lines done -> bytes

    def watch(counts: Counts) -> None:
        done = counts.answered + counts.failed
        if done >= num_lines // 10 and done % (num_lines // 100) == 0:
            marks.setdefault(done, anonymous_bytes())

    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        folder = Path(name)
        write_model(folder / "model", MODEL)
        write_tokenizer(folder / "tokenizer.model")
        write_requests(folder / "in.jsonl", num_lines)
        llm = Llama.build(folder / "model", max_seq_len=256, dtype="fp32", kv_cache_memory=1 << 22)
        started = time.perf_counter()
        counts = Batch(llm, folder / "in.jsonl", folder / "out.jsonl").run(watch)
        elapsed = time.perf_counter() - started
    growth = linear_regression(list(marks), list(marks.values())).slope
    print(f"{counts.answered} answered, {counts.failed} failed in {elapsed:.0f} s")
    for done, size in list(marks.items())[:: len(marks) // 6]:
        print(f"{size / 2**20:.1f} MiB after {done} lines")
    print(f"{growth:.0f} bytes a line")
    report({"lines": num_lines, "bytes_per_line": round(growth, 1), "target": TARGET, "seconds": round(elapsed)})


if __name__ == "__main__":
    main()
