"""Runs on every rank under torchrun: one of them is killed in the middle of an answer."""

import os
import signal
import sys

from llama import Llama, SamplingParams


def main(checkpoint: str, tokenizer: str, victim: str) -> None:
    llm = Llama.build(checkpoint, tokenizer, max_seq_len=64, device="cpu", dtype="fp32")
    if llm.rank == int(victim):
        run = llm.engine.runner.run
        left = iter(range(5))

        def die(pack):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(pack)

        llm.engine.runner.run = die
    llm.complete([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
    print("all ranks answered")


if __name__ == "__main__":
    main(*sys.argv[1:])
