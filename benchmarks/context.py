"""How a decode step's time grows with the context, beside what the bytes that it reads predict.

    python benchmarks/context.py [--context 4096] [--steps 32] [--rounds 7]

The default model in bfloat16 decodes one stream behind a prompt of one token, and behind one that fills the context, in
turns. A step reads every linear layer's weights once (the output layer's too, the embedding only where it is the output
layer), and the stream's own keys and values. At the limit of memory bandwidth the second time is therefore the first,
times the bytes of the second over the bytes of the first; `measured / predicted` says how near the engine is, and
should be 1.15 at most. A side's figure in a round is the median of its steps. The last line is JSON.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from common.machine import machine
from common.shapes import weight_shapes
from common.timing import alternate, median, report, seconds
from common.works import add

from llama import Llama, ModelArgs

TARGET = 1.15
DTYPE = torch.bfloat16
WARM_UP = 2  # steps of a stream that are not counted


def weight_bytes(args: ModelArgs) -> int:
    """Bytes of the matrices that a step of one token multiplies with."""
    sizes = {name: size for name, size in weight_shapes(args).items() if len(size) == 2}
    if not args.tie_word_embeddings:
        del sizes["tok_embeddings.weight"]
    return DTYPE.itemsize * sum(rows * columns for rows, columns in sizes.values())


def mean_context(prompt_length: int, num_steps: int) -> float:
    """Of the counted steps: the first one after the prompt's sees one token more than the prompt has."""
    return prompt_length + WARM_UP + (1 + num_steps) / 2


def step_time(llm: Llama, prompt_length: int, num_steps: int) -> float:
    """The median seconds of a decode step behind a new prompt, which is new so that its cache lies in one piece."""
    engine = llm.engine
    prompt = torch.randint(100, llm.model.vocab_size, (prompt_length,)).tolist()
    add(engine, prompt, 1 + WARM_UP + num_steps)
    while not any(event.token is not None for event in engine.step()):
        pass  # the prompt takes several steps
    for _ in range(WARM_UP):
        engine.step()
    times = [seconds(engine.step) for _ in range(num_steps)]
    assert not engine.has_work, "the stream should end with the last step"
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    limits = machine()
    print(limits, flush=True)
    torch.manual_seed(0)
    llm = Llama.build(max_seq_len=options.context + options.steps + WARM_UP + 1, dtype="bf16", quantization="none")
    prompts = {"short": 1, "long": options.context - WARM_UP - options.steps // 2}
    sides = {name: partial(step_time, llm, length, options.steps) for name, length in prompts.items()}
    times = {name: median(figures) for name, figures in alternate(options.rounds, **sides).items()}
    weights, per_token = weight_bytes(llm.model.params), llm.model.cache_shape.bytes_per_token(DTYPE)
    contexts = {name: mean_context(length, options.steps) for name, length in prompts.items()}
    moved = {name: weights + per_token * context for name, context in contexts.items()}
    predicted = times["short"] * moved["long"] / moved["short"]
    for name in prompts:
        print(
            f"context {contexts[name]:6.0f}: {1e3 * times[name]:7.2f} ms, {moved[name] / 1e6:6.1f} MB, "
            f"{moved[name] / times[name] / 1e9:5.1f} GB/s"
        )
    ratio = times["long"] / predicted
    print(f"predicted {1e3 * predicted:.2f} ms; measured / predicted {ratio:.2f} (target {TARGET})")
    report(
        {
            "machine": limits,
            "contexts": contexts,
            "step_ms": {name: round(1e3 * time, 3) for name, time in times.items()},
            "weight_bytes": weights,
            "kv_bytes_per_token": per_token,
            "predicted_ms": round(1e3 * predicted, 3),
            "measured_to_predicted": round(ratio, 3),
            "target": TARGET,
        }
    )


if __name__ == "__main__":
    main()
