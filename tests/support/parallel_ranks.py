"""Runs on every rank under torchrun: a model on all ranks, each rank's answers as a JSON file in a directory."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama import Llama, SamplingParams
from llama.generation import Completion


def main(checkpoint: str, tokenizer: str, directory: str) -> None:
    llm = Llama.build(checkpoint, tokenizer, max_seq_len=64, device="cpu", dtype="fp32")
    prompts = [[1, 5, 9, 11], [1, 7], [1, *range(20, 50)]]
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    seeded = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, seed=4)
    completions: list[Completion] = llm.complete(prompts, greedy) + llm.complete(prompts, seeded)
    many = [
        SamplingParams(temperature=i % 2, max_tokens=1 + i % 7, ignore_eos=True, seed=i, n=1 + (i % 5 == 0))
        for i in range(24)
    ]
    llm.engine.scheduler.chunk = 16
    completions += llm.complete([[1, *range(i, 3 * i + 2)] for i in range(24)], many)
    completions += llm.complete(prompts, replace(seeded, regex="([a-z]{2,3} ){1,3}[!?]", n=2))
    streamed = "".join(llm.stream_text(prompts[0], greedy))
    assert streamed == completions[0].text, "what is streamed differs from what is returned"
    for leaving in (
        [0, 1, 2, 3],
        [0],
        [1, 2, 3],
    ):  # a stream left early on all ranks, on the first, on the others
        for number, _ in enumerate(llm.stream_text(prompts[0], greedy)):
            if number == 2 and llm.rank in leaving:
                break
    assert llm.complete(prompts[:1], greedy)[0].tokens == completions[0].tokens, "a stream left early is felt"
    try:
        llm.complete([[1] * 65], greedy)
        raise AssertionError("a prompt that is too long was taken")
    except ValueError as error:
        refusal = str(error)
    second = Llama.build(checkpoint, tokenizer, max_seq_len=64, device="cpu", dtype="fp32", draft=checkpoint)
    again = second.complete(prompts[:1], greedy)
    assert again[0].tokens == completions[0].tokens, "a second build, with a draft model, answers differently"
    assert second.rank or second.engine.stats().num_accepted_tokens, "nothing was guessed"
    with pytest.raises((OSError, ValueError), match="nowhere"):
        Llama.build(checkpoint, tokenizer, max_seq_len=64, device="cpu", dtype="fp32", draft=Path("nowhere/at-all"))
    answers = {
        "tokens": [completion.tokens for completion in completions],
        "logprobs": [entry.logprob for completion in completions[:3] for entry in completion.logprobs],
        "prompt_logprobs": [e.logprob for c in completions[:3] for e in c.prompt_logprobs[1:]],
        "refusal": refusal,
    }
    (Path(directory) / f"{llm.rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
