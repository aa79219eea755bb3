"""Runs on every rank under torchrun: the default model continues the tokens that are given."""

import sys

from llama import Llama, SamplingParams


def main(*tokens: str) -> None:
    llm = Llama.build(max_seq_len=256, device="cpu", dtype="fp32", quantization="none")
    [completion] = llm.complete([[int(token) for token in tokens]], SamplingParams(temperature=0.0, max_tokens=8))
    if llm.rank == 0:
        print(f"tokens {completion.tokens}")


if __name__ == "__main__":
    main(*sys.argv[1:])
