"""What an engine is given to do, and how long it takes: a prompt, one stream, many streams."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llama import Llama, SamplingParams
from llama.answer import Query
from llama.engine import Engine
from llama.quantization import LowBitLinear

from .timing import seconds


@dataclass(frozen=True)
class Work:
    num_prompts: int
    prompt_tokens: int
    num_tokens: int  # that each prompt generates


def random_prompts(work: Work, vocab_size: int) -> list[list[int]]:
    """New ones each time: none begins as one before it did."""
    return [random.choices(range(3, vocab_size), k=work.prompt_tokens) for _ in range(work.num_prompts)]


def add(engine: Engine, prompt: list[int], num_tokens: int) -> int:
    """Asks for so many of the likeliest tokens, and for no end before."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return engine.add(Query(prompt, params.resolve()))


def run_ours(llm: Llama, work: Work) -> float:
    """Seconds up to the first tokens where only those are wanted, else of one step after them."""
    engine = llm.engine
    for prompt in random_prompts(work, llm.model.vocab_size):
        add(engine, prompt, work.num_tokens)

    def prefill() -> None:
        begun: set[int] = set()
        while len(begun) < work.num_prompts:
            begun |= {event.request_id for event in engine.step()}

    def decode() -> None:
        while engine.has_work:
            engine.step()

    prefill_seconds = seconds(prefill)
    if work.num_tokens == 1:
        return prefill_seconds
    return seconds(decode) / (work.num_tokens - 1)


def low_bit_linears(llm: Llama) -> list[LowBitLinear]:
    return [module for module in llm.model.modules() if isinstance(module, LowBitLinear)]


def packed_bytes(linears: list[LowBitLinear]) -> int:
    """Of the published layout."""
    return sum(linear.format.packed_columns(linear.in_features) * linear.out_features for linear in linears)
