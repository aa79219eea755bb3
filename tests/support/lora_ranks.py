"""Runs on every rank: models with an adapter beside them, against what PEFT has computed."""

import sys
from pathlib import Path

import torch

from llama import Llama, SamplingParams

TOKENS = [1, 50, 7, 200, 33, 90, 12, 5]
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


def scores(llm: Llama, adapter: str | None) -> torch.Tensor:
    [completion] = llm.complete([TOKENS], SCORE, adapter)
    return torch.tensor([entry.logprob for entry in completion.prompt_logprobs[1:]])


def main(directory: str, num_stages: str) -> None:
    common = {"max_seq_len": 64, "dtype": "fp32", "device": "cpu", "pipeline_parallel_size": int(num_stages)}
    for folder in sorted(Path(directory).iterdir()):
        expected = torch.load(folder / "expected.pt")
        adapters = {"x": folder / "adapter"}
        llm = Llama.build(folder / "base", adapters=adapters, **common)
        plain = scores(llm, None)
        torch.testing.assert_close(scores(llm, "x"), expected, rtol=1e-4, atol=1e-4)
        llm.unload_adapter("x")
        assert torch.equal(scores(llm, None), plain)
        for layer in llm.model.held_layers.values():
            assert layer.attention.qkv.added is None, "the adapter is still there"
        llm.close()
        merged = Llama.build(folder / "base", adapter=folder / "adapter", **common)
        torch.testing.assert_close(scores(merged, None), expected, rtol=1e-4, atol=1e-4)
        if merged.rank == 0:
            print("as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])
