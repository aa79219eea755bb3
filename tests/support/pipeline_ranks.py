"""Runs on every rank: a model cut into stages, against what one process has said.

    pipeline_ranks.py CHECKPOINT EXPECTED NUM_STAGES OPTIONS

EXPECTED is a JSON file with what `answers` gave there, OPTIONS more of `Llama.build` in JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, SamplingParams
from llama.cache import CacheShape
from llama.parallel import num_launched

NUM_BLOCKS = 7  # fewer than the requests would take together
PROMPTS = [[1, 7], [1, *range(20, 50)], [1, *range(20, 46), 9], *([1, *range(i, i + 12)] for i in range(100, 104))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0)


def build(checkpoint: Path, args: dict[str, int], num_stages: int = 1, **options: Any) -> Llama:
    """With the memory for NUM_BLOCKS blocks on the stages that have most layers."""
    layers, heads = -(-args["n_layers"] // num_stages), args["n_kv_heads"] // (num_launched() // num_stages)
    head_dim, dtype = args["dim"] // args["n_heads"], torch.int8 if "kv_dtype" in options else torch.float32
    each = CacheShape(layers, heads, head_dim).bytes_per_token(dtype)
    if options.get("draft") == str(checkpoint):  # whole, on rank 0
        each += CacheShape(args["n_layers"], args["n_kv_heads"], head_dim).bytes_per_token(dtype)
    adapter = checkpoint / "adapter"
    return Llama.build(
        checkpoint,
        max_seq_len=64,
        device="cpu",
        dtype="fp32",
        adapters={"x": adapter} if adapter.exists() else {},
        kv_cache_memory=NUM_BLOCKS * 16 * each,
        pipeline_parallel_size=num_stages,
        **options,
    )


def answers(llm: Llama) -> dict[str, Any]:
    """What it says to prompts of which not all have room at a time, and to some that begin like earlier ones."""
    greedy = llm.complete(PROMPTS, GREEDY)
    seeded = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=4, n=2)
    completions = greedy + llm.complete(PROMPTS[:4], seeded) + llm.complete(PROMPTS[1:3], GREEDY)
    stats = llm.engine.stats()
    assert stats.num_blocks == NUM_BLOCKS
    assert llm.rank or (stats.num_preemptions and stats.num_hit_tokens), stats
    if llm.adapters:
        completions += llm.complete(PROMPTS, GREEDY, "x")
    return {
        "tokens": [completion.tokens for completion in completions],
        "logprobs": [[entry.logprob for entry in completion.logprobs] for completion in greedy],
        "scores": [[entry.logprob for entry in text[1:]] for text in llm.score(PROMPTS)],
        "vectors": [vector for pooling in ("mean", "last") for vector in llm.embed(PROMPTS, pooling).tolist()],
    }


def main(checkpoint: str, expected: str, num_stages: str, options: str = "{}") -> None:
    path, stages, more = Path(checkpoint), int(num_stages), json.loads(options)
    args = json.loads((path / "params.json").read_text())
    llm = build(path, args, stages, **more)
    held = llm.model.held_layers
    assert len(held) == len(llm.engine.runner.cache.layers) <= -(-args["n_layers"] // stages)
    names = {name.split(".")[1] for name in llm.model.state_dict() if name.startswith("layers.")}
    assert names == set(map(str, held)), "weights of other stages were loaded"
    found, wanted = answers(llm), json.loads(Path(expected).read_text())
    assert found["tokens"] == wanted["tokens"]
    is_exact = num_launched() == stages and "draft" not in more  # a step's rows depend on what is guessed when
    rounding = 0.0 if is_exact else 1e-4
    for key in ("logprobs", "scores", "vectors"):
        for one, other in zip(found[key], wanted[key], strict=True):
            assert one == pytest.approx(other, abs=rounding, rel=0), key
    with pytest.raises(ValueError, match="call Llama"):
        llm.model(None, 0)
    with pytest.raises(ValueError, match="a compiled package is of one process"):
        build(path, args, stages, compile=True)
    if llm.rank == 0:
        print("as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])
