"""transformers, as `lines.py` says, in its eager mode and without its `generate`, which adds to every step.

"load" takes a directory in Hugging Face's layout and `dtype`, the type that the engine itself chose on this machine.
All prompts of a run are one batch, which needs no padding.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lines import answer_lines
from transformers import AutoModelForCausalLM, DynamicCache

MODEL: list[Any] = []  # the one that is loaded


def load(path: str, threads: int, dtype: str, device: str = "cpu", **unused: object) -> dict:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    MODEL[:] = [model.eval().to(device)]
    return {"vocab_size": model.config.vocab_size}


@torch.inference_mode()
def run(prompts: list[list[int]], num_tokens: int) -> dict:
    [model] = MODEL
    cache = DynamicCache(config=model.config)
    tokens, seconds = [torch.tensor(prompts, device=model.device)], []
    for _ in range(num_tokens):
        started = time.perf_counter()
        logits = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens.append(logits.argmax(-1, keepdim=True))
        tokens[-1].tolist()  # a device has done it only then
        seconds.append(time.perf_counter() - started)
    answers = torch.cat(tokens[1:], 1).tolist()
    return {"first_seconds": seconds[0], "step_seconds": seconds[1:], "tokens": answers}


answer_lines(load=load, run=run)
