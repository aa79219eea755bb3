"""Runs on every rank under torchrun: the default model continues the tokens that are given."""

import sys

from llama import Llama, SamplingParams


def main(tokens: list[int]) -> None:
    llm = Llama.build(max_seq_len=256, device="cpu", dtype="fp32", quantization="none")
    [completion] = llm.complete([tokens], SamplingParams(temperature=0.0, max_tokens=8))
    if llm.rank == 0:
        print(f"tokens {completion.tokens}")


if __name__ == "__main__":
    main([int(token) for token in sys.argv[1:]])
