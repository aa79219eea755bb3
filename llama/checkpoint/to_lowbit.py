"""Writing a low-bit directory: a Hugging Face directory with its linears packed, as `lowbit.py` reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..files.json import json_bytes
from ..files.writing import Entry
from ..quantization import FORMATS
from .conversion import write_plan
from .names import TO_HF, deinterleave, is_rotary, module_name, rename
from .packing import LINEARS, untied
from .plan import Plan
from .to_huggingface import plan_huggingface
from .tokenizer_files import TokenizerFiles
from .weight import Checkpoint, Weight


def save_low_bit(
    checkpoint: Checkpoint,
    destination: str | Path,
    format: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a low-bit directory, one weight at a time, tokenizer included; gives warnings as `convert` does.

    Linears are packed, the output layer too (an output layer that is the embedding becomes one of its own);
    embeddings, norms and biases stay as they are. Weights that are stored in this format already are taken as they
    are. Raises LowBitError where the columns are not whole blocks.
    """
    return write_plan(checkpoint.path, destination, partial(plan_lowbit, checkpoint, format), progress)


def plan_lowbit(checkpoint: Checkpoint, format: str) -> Plan:
    checkpoint = untied(checkpoint)
    tokenizer = None if checkpoint.tokenizer_path is None else TokenizerFiles(checkpoint.tokenizer_path)
    weights = {rename(weight.name, TO_HF): weight for weight in checkpoint.weights()}
    embedding = weights[rename("tok_embeddings.weight", TO_HF)]
    dtype = torch.bfloat16 if embedding.is_packed else embedding.array.dtype
    plan = plan_huggingface(checkpoint, dtype, tokenizer)
    for file, outputs in plan.tensor_files.items():
        plan.tensor_files[file] = [
            packed_output(output, weights[output.name], format, checkpoint.args.head_dim)
            for output in outputs
        ]
    config = json.loads(plan.small_files["config.json"])
    plan.small_files["config.json"] = json_bytes(config | {"quantization": format})
    plan.warnings += [] if tokenizer is None else tokenizer.warnings
    return plan


def packed_output(output: Entry, weight: Weight, format: str, head_dim: int) -> Entry:
    """The packed form of what would be written, if it is a linear's matrix."""
    if module_name(weight.name) not in LINEARS or len(weight.shape) != 2:
        return output

    def read() -> Tensor:
        is_ready = weight.format == format
        packed = weight.read_packed()[0] if is_ready else FORMATS[format].quantize(weight.read())
        return deinterleave(packed, head_dim).flatten(0, 2) if is_rotary(weight.name) else packed

    rows, columns = weight.shape
    return replace(
        output, shape=(rows, FORMATS[format].packed_columns(columns)), dtype=torch.uint8, read=read
    )
