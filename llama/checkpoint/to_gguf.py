"""Writing a GGUF file of the llama architecture, in plain types, with its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..files.gguf import FLOAT32, KINDS, STRING, UINT32, Value, write_gguf
from ..files.writing import Entry
from ..model import ModelArgs
from ..rotary import LinearScaling, Llama3Scaling, rope_factors
from .gguf import ROPE_FACTORS, SAMPLING
from .names import TO_GGUF, rename
from .output import output
from .plan import Plan
from .tokenizer_files import TokenizerFiles
from .weight import Checkpoint, CheckpointError

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


def plan_gguf(checkpoint: Checkpoint, dtype: torch.dtype, tokenizer: TokenizerFiles | None) -> Plan:
    """One GGUF file; vectors (norms, biases) are float32, as llama.cpp wants them."""
    if dtype not in KINDS:
        raise CheckpointError(
            f"GGUF is written in fp32, fp16 or bf16, not {str(dtype).removeprefix('torch.')}"
        )
    values = metadata(checkpoint, dtype)
    plan = Plan(write_gguf, {}, is_directory=False)
    if tokenizer is None:
        plan.warnings.append("no tokenizer was found; programs cannot tokenize with this file")
    else:
        values |= tokenizer.for_gguf(checkpoint.args.vocab_size, checkpoint.stop_ids)
    if checkpoint.args.sliding_window is not None:
        plan.warnings.append("llama.cpp ignores the sliding window of this architecture")
    plan.metadata = values
    plan.tensor_files[""] = list(_outputs(checkpoint, dtype))
    return plan


def _outputs(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Entry]:
    scaling = checkpoint.args.rope_scaling
    if isinstance(scaling, Llama3Scaling):
        factors = rope_factors(checkpoint.args.head_dim, checkpoint.args.rope_theta, scaling)
        yield Entry(ROPE_FACTORS, tuple(factors.shape), torch.float32, lambda: factors)
    for weight in checkpoint.weights():
        name = rename(weight.name, TO_GGUF)
        if name is None:
            raise CheckpointError(f"{weight.file}: {weight.name}: has no name in GGUF")
        yield output(weight, name, torch.float32 if len(weight.shape) == 1 else dtype)


def metadata(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Value]:
    """The header's keys, but for the tokenizer's."""
    args = checkpoint.args
    values = {
        "general.architecture": Value(STRING, "llama"),
        "general.type": Value(STRING, "model"),
        "general.name": Value(STRING, checkpoint.path.stem),
        "general.file_type": Value(UINT32, FILE_TYPES[dtype]),
    }
    numbers = {
        "block_count": args.n_layers,
        "context_length": args.max_seq_len,
        "embedding_length": args.dim,
        "feed_forward_length": args.hidden_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.n_kv_heads,
        "attention.key_length": args.head_dim,
        "attention.value_length": args.head_dim,
        "attention.layer_norm_rms_epsilon": args.norm_eps,
        "rope.dimension_count": args.head_dim,
        "rope.freq_base": args.rope_theta,
        "vocab_size": args.vocab_size,
    }
    if args.sliding_window is not None:
        numbers["attention.sliding_window"] = args.sliding_window
    values |= {f"llama.{key}": _number(value) for key, value in numbers.items()}
    return values | _scaling(args) | _sampling(checkpoint)


def _number(value: Any) -> Value:
    return Value(FLOAT32 if isinstance(value, float) else UINT32, value)


def _scaling(args: ModelArgs) -> dict[str, Value]:
    """Linear scaling; of Llama 3's, which is stored as a tensor of factors, what is not as usual."""
    scaling = args.rope_scaling
    if scaling is None:
        return {}
    prefix = "llama.rope.scaling."
    if isinstance(scaling, LinearScaling):
        return {f"{prefix}type": Value(STRING, "linear"), f"{prefix}factor": _number(scaling.factor)}
    if scaling == Llama3Scaling(scaling.factor):
        return {}
    return {
        f"{prefix}original_context_length": _number(scaling.original_max_seq_len),
        f"{prefix}low_freq_factor": _number(scaling.low_freq_factor),
        f"{prefix}high_freq_factor": _number(scaling.high_freq_factor),
    }


def _sampling(checkpoint: Checkpoint) -> dict[str, Value]:
    defaults = checkpoint.generation_defaults
    return {
        f"general.sampling.{key}": _number(defaults[name])
        for key, name in SAMPLING.items()
        if name in defaults
    }
