"""Runs on each machine's rank: answers, waits for a line on standard input, and answers again, until there is none."""

import os
import sys
from pathlib import Path

from llama import Llama, SamplingParams


def main(checkpoint: str, pids: str, num_stages: str) -> None:
    llm = Llama.build(checkpoint, max_seq_len=64, device="cpu", dtype="fp32", pipeline_parallel_size=int(num_stages))
    (Path(pids) / str(llm.rank)).write_text(str(os.getpid()))
    while True:
        [completion] = llm.complete([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        if llm.rank == 0:
            print(f"tokens {completion.tokens}", flush=True)
        if not llm.share(sys.stdin.readline() if llm.rank == 0 else None):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
