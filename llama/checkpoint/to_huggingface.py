"""Writing a Hugging Face directory: config.json, safetensors, their index, the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..files.json import json_bytes
from ..files.safetensors import write_safetensors
from ..files.writing import Entry
from ..model import ModelArgs
from ..rotary import LinearScaling
from .arrays import Reordered
from .names import TO_HF, deinterleave, is_rotary, rename
from .output import output
from .plan import Plan
from .to_meta import rope_scaling_object
from .tokenizer_files import TokenizerFiles
from .weight import Checkpoint, CheckpointError

MAX_SHARD_SIZE = 5_000_000_000


def plan_huggingface(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    tokenizer: TokenizerFiles | None,
    *,
    shards: int | None = None,
    max_shard_size: int | None = None,
) -> Plan:
    """safetensors files: exactly `shards` of them, or as many as `max_shard_size` bytes each need."""
    args = checkpoint.args
    outputs = list(_outputs(checkpoint, dtype))
    groups = _even_groups(outputs, shards) if shards else _groups(outputs, max_shard_size or MAX_SHARD_SIZE)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = {"model.safetensors": outputs} if count == 1 else dict(zip(names, groups, strict=True))
    plan = Plan(write_safetensors, files, metadata={"format": "pt"})
    plan.small_files["config.json"] = json_bytes(config(checkpoint, dtype, tokenizer))
    plan.small_files["generation_config.json"] = json_bytes(generation_config(checkpoint, tokenizer))
    if count > 1:
        places = {one.name: name for name, group in files.items() for one in group}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": places}
        plan.small_files["model.safetensors.index.json"] = json_bytes(index)
    if tokenizer is None:
        plan.warnings.append("no tokenizer was found; transformers will not tokenize for this directory")
    else:
        plan.small_files |= tokenizer.for_huggingface()
    if args.sliding_window is not None and (
        args.attention_bias or args.attention_output_bias or args.mlp_bias
    ):
        raise CheckpointError(
            f"{checkpoint.path}: Hugging Face has no model with a sliding window and biases"
        )
    return plan


def _outputs(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Entry]:
    args = checkpoint.args
    for weight in checkpoint.weights():
        name = rename(weight.name, TO_HF)
        if name is None:
            raise CheckpointError(f"{weight.file}: {weight.name}: has no name in Hugging Face's format")
        if is_rotary(weight.name):
            weight = replace(weight, array=Reordered(weight.array, args.head_dim, deinterleave))
        yield output(weight, name, dtype)
    if args.attention_bias != args.attention_output_bias:  # Hugging Face has either all four biases or none
        yield from _zero_biases(args, dtype)


def _zero_biases(args: ModelArgs, dtype: torch.dtype) -> Iterator[Entry]:
    key_rows = args.n_kv_heads * args.head_dim
    sizes = {"q_proj": args.n_heads * args.head_dim, "k_proj": key_rows, "v_proj": key_rows}
    missing = {"o_proj": args.dim} if args.attention_bias else sizes
    for layer in range(args.n_layers):
        for name, size in missing.items():
            yield Entry(
                f"model.layers.{layer}.self_attn.{name}.bias", (size,), dtype, partial(torch.zeros, size)
            )


def config(checkpoint: Checkpoint, dtype: torch.dtype, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """config.json in the spelling that old and new transformers both read."""
    args = checkpoint.args
    kind = "llama" if args.sliding_window is None else "mistral"
    scaling = args.rope_scaling
    stretched = scaling.factor if isinstance(scaling, LinearScaling) else 1
    values: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": int(args.max_seq_len / stretched),
        "rope_theta": args.rope_theta,
        "rope_scaling": None if scaling is None else rope_scaling_object(args),
        "vocab_size": args.vocab_size,
        "tie_word_embeddings": args.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "llama":
        values |= {
            "attention_bias": args.attention_bias or args.attention_output_bias,
            "mlp_bias": args.mlp_bias,
        }
    else:
        values["sliding_window"] = args.sliding_window
    return values | token_ids(checkpoint, tokenizer)


def token_ids(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` (one id, or the list of all that end an answer)."""
    stop_ids = list(checkpoint.stop_ids)
    values: dict[str, Any] = {}
    if tokenizer is not None:
        values["bos_token_id"] = tokenizer.bos_id
        stop_ids = stop_ids or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    values["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids or None
    return values


def generation_config(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """generation_config.json: what ends an answer, and the sampling defaults that the model came with."""
    defaults = dict(checkpoint.generation_defaults)
    if defaults.get("temperature") == 0.0:
        del defaults["temperature"]
        return {"do_sample": False, **defaults, **token_ids(checkpoint, tokenizer)}
    sampled = {"do_sample": True} if "temperature" in defaults or "top_p" in defaults else {}
    return sampled | defaults | token_ids(checkpoint, tokenizer)


def _groups(outputs: list[Entry], limit: int) -> list[list[Entry]]:
    """Neighbouring tensors in files of at most `limit` bytes; a larger tensor has a file of its own."""
    groups: list[list[Entry]] = []
    size = limit + 1
    for one in outputs:
        if size + one.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.nbytes
    return groups


def _even_groups(outputs: list[Entry], count: int) -> list[list[Entry]]:
    """Neighbouring tensors in exactly `count` files of about equal size."""
    if count > len(outputs):
        raise CheckpointError(f"{count} files were asked for, but the model has {len(outputs)} tensors")
    total = sum(one.nbytes for one in outputs)
    groups: list[list[Entry]] = [[]]
    done = 0
    for number, one in enumerate(outputs):
        left = len(outputs) - number
        is_full = groups[-1] and done >= total * len(groups) / count
        if len(groups) < count and (is_full or left == count - len(groups)):
            groups.append([])
        groups[-1].append(one)
        done += one.nbytes
    return groups
