"""This engine, as `lines.py` says; run by its own interpreter."""

from __future__ import annotations

import time

from lines import answer_lines

from llama import Llama, SamplingParams  # before torch: it sets what threads do while they wait
from llama.answer import Query
from llama.linear import Linear
from llama.quantization import LowBitLinear

import torch  # isort: skip

LLM: list[Llama] = []  # the one that is loaded


def load(path: str, threads: int, precision: str | None, draft: str = "none", **options: object) -> dict:
    """`precision` is a low-bit format, "none", or None: as stored; `options` are those of `Llama.build`.

    Without a drafter, unless one is named: what a random model repeats is easier to guess than what people ask for.
    """
    torch.set_num_threads(threads)
    LLM[:] = [Llama.build(path, quantization=precision, draft=draft, **options)]
    model = LLM[0].model
    linears = [module for module in model.modules() if isinstance(module, Linear | LowBitLinear)]
    inner = sum(one.in_features * one.out_features for one in linears if one is not model.output)
    dtype = model.norm.weight.dtype
    tied = model.tok_embeddings.weight.nbytes if model.output is None else 0  # read as the output layer
    return {
        "vocab_size": model.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": sum(stored_bytes(linear, dtype) for linear in linears) + tied,
        "kv_bytes_per_token": model.cache_shape.bytes_per_token(dtype),
        "inner_products": inner,
        "output_products": model.vocab_size * model.params.dim,
    }


def stored_bytes(linear: Linear | LowBitLinear, dtype: torch.dtype) -> int:
    """Bytes of a layer's matrix, which every step reads: of a low-bit one's published layout, else of `dtype`."""
    if isinstance(linear, LowBitLinear):
        return linear.format.packed_columns(linear.in_features) * linear.out_features
    return linear.in_features * linear.out_features * dtype.itemsize


def run(prompts: list[list[int]], num_tokens: int) -> dict:
    engine = LLM[0].engine
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True).resolve()
    order = [engine.add(Query(prompt, params)) for prompt in prompts]
    tokens: dict[int, list[int]] = {}

    def step() -> float:
        started = time.perf_counter()
        events = engine.step()
        taken = time.perf_counter() - started
        for event in events:
            tokens.setdefault(event.request_id, []).append(event.token)
        return taken

    first = 0.0
    while len(tokens) < len(prompts):
        first += step()
    steps = []
    while engine.has_work:
        steps.append(step())
    return {"first_seconds": first, "step_seconds": steps, "tokens": [tokens[one] for one in order]}


answer_lines(load=load, run=run)
