"""Writing Meta's layout: `consolidated.NN.pth` and `params.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..files.json import json_bytes
from ..files.torch_zip import write_torch_file
from ..model import ModelArgs, check_divides
from ..rotary import LinearScaling, Llama3Scaling
from .load import split_dim
from .meta import FACTOR_32, context
from .names import module_name
from .output import output
from .plan import Plan
from .tokenizer_files import TokenizerFiles
from .weight import Checkpoint, Weight

ROUNDINGS = (
    256,
    4096,
    1024,
    512,
    128,
    64,
    32,
    16,
    8,
    4,
    2,
    1,
)  # what `multiple_of` may be; Meta's own values first
MULTIPLIERS = (None, 1.3, 1.2, 1.5, 1.0)


def plan_meta(
    checkpoint: Checkpoint, dtype: torch.dtype, tokenizer: TokenizerFiles | None, *, shards: int | None = None
) -> Plan:
    """`shards` files in Meta's layout. Raises ValueError for a number that does not divide the model."""
    args, shards = checkpoint.args, shards or 1
    check_divides(args, shards)
    embedding_dim = (
        1 if tokenizer is not None and tokenizer.is_sentencepiece else 0
    )  # Llama 2's way, Llama 3's way
    weights = list(_with_output(checkpoint))
    files = {
        f"consolidated.{rank:02d}.pth": [
            output(_piece(weight, rank, shards, embedding_dim), weight.name, dtype) for weight in weights
        ]
        for rank in range(shards)
    }
    plan = Plan(write_torch_file, files)
    plan.small_files["params.json"] = json_bytes(params(args, tokenizer))
    plan.warnings += warnings(args, tokenizer)
    generation = generation_config(checkpoint)
    if generation:
        plan.small_files["generation_config.json"] = json_bytes(generation)
    if tokenizer is not None:
        plan.small_files |= tokenizer.for_meta()
    return plan


def _with_output(checkpoint: Checkpoint) -> Iterator[Weight]:
    """Every weight, and the embedding a second time where it is the output layer: the reference wants both."""
    for weight in checkpoint.weights():
        yield weight
        if checkpoint.args.tie_word_embeddings and weight.name == "tok_embeddings.weight":
            yield Weight("output.weight", weight.array, weight.file)


def _piece(weight: Weight, rank: int, shards: int, embedding_dim: int) -> Weight:
    is_embedding = module_name(weight.name) == "tok_embeddings"
    return weight.part(embedding_dim if is_embedding else split_dim(weight.name), rank, shards)


def params(args: ModelArgs, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """params.json: the reference's own keys, and others only where the reference cannot express the model."""
    multiple_of, multiplier = hidden_rounding(args)
    is_sentencepiece = tokenizer is not None and tokenizer.is_sentencepiece
    values: dict[str, Any] = {"dim": args.dim, "multiple_of": multiple_of}
    if multiplier is not None:
        values["ffn_dim_multiplier"] = multiplier
    values |= {"n_heads": args.n_heads, "n_layers": args.n_layers, "norm_eps": args.norm_eps}
    if args.n_kv_heads != args.n_heads:
        values["n_kv_heads"] = args.n_kv_heads
    values["vocab_size"] = -1 if is_sentencepiece else args.vocab_size
    if args.rope_theta != 10000.0:
        values["rope_theta"] = args.rope_theta
    if args.head_dim != args.dim // args.n_heads:
        values["head_dim"] = args.head_dim
    if args.sliding_window is not None:
        values["sliding_window"] = args.sliding_window
    return values | _scaling(args)


def _scaling(args: ModelArgs) -> dict[str, Any]:
    scaling = args.rope_scaling
    if scaling is None:
        return {}
    if scaling != Llama3Scaling(scaling.factor):
        return {"rope_scaling": rope_scaling_object(args)}
    inferred = 32.0 if (args.dim, args.n_layers) in FACTOR_32 else 8.0
    factor = {} if scaling.factor == inferred else {"rope_scaling_factor": scaling.factor}
    return {"use_scaled_rope": True} | factor


def rope_scaling_object(args: ModelArgs) -> dict[str, Any]:
    """Rope scaling in Hugging Face's words."""
    scaling = args.rope_scaling
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def hidden_rounding(args: ModelArgs) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` from which the reference computes this model's hidden size."""
    for multiplier in MULTIPLIERS:
        for multiple_of in ROUNDINGS:
            if _hidden_dim(args.dim, multiple_of, multiplier) == args.hidden_dim:
                return multiple_of, multiplier
    base = int(8 * args.dim / 3)
    return 1, next(
        multiplier
        for digits in range(3, 18)
        if _hidden_dim(args.dim, 1, multiplier := round((args.hidden_dim + 0.5) / base, digits))
        == args.hidden_dim
    )


def _hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    return args.hidden_dim


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sampling defaults and stop ids, and the context as `max_length` where Meta's family would suggest another."""
    values: dict[str, Any] = dict(checkpoint.generation_defaults)
    if checkpoint.stop_ids:
        values["eos_token_id"] = list(checkpoint.stop_ids)
    if checkpoint.args.max_seq_len != context(checkpoint.args):
        values["max_length"] = checkpoint.args.max_seq_len
    return values


def warnings(args: ModelArgs, tokenizer: TokenizerFiles | None) -> list[str]:
    """What Meta's Llama 2 code lacks to run this model."""
    lacks = {
        f"a rope_theta of {args.rope_theta:g}": args.rope_theta != 10000.0,
        "rope scaling": args.rope_scaling is not None,
        f"a head_dim of {args.head_dim}": args.head_dim != args.dim // args.n_heads,
        "a sliding window": args.sliding_window is not None,
        "biases": args.attention_bias or args.attention_output_bias or args.mlp_bias,
        "this kind of tokenizer": tokenizer is not None and not tokenizer.is_sentencepiece,
    }
    lines = [
        f"Meta's Llama 2 code cannot run this model: it lacks {what}"
        for what, wrong in lacks.items()
        if wrong
    ]
    return lines if tokenizer is not None else [*lines, "no tokenizer was found; put a tokenizer.model there"]
