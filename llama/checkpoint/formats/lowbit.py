"""Low-bit directories, both ways: Hugging Face's, with linears in blocks, whose format config.json names.

Ours name it under `quantization`, BigDL-LLM 2.4's under `bigdl_transformers_low_bit`. A packed weight is uint8 in the
published layout of its format (`llama/kernels/formats.py`), (rows, bytes of a row); BigDL-LLM flattens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...files.errors import CheckpointError
from ...files.json import json_bytes
from ...files.tensor_file import TensorFile
from ...files.writing import Entry, Plan
from ...kernels.formats import FORMATS, LowBitFormat
from ...model import ModelArgs
from ..arrays import Array, LowBitMatrix, Mapped
from ..inventory import TO_HF, deinterleave, expected_shapes, is_linear, is_rotary, module_of, rename
from ..opened import Checkpoint, dominant_dtype
from ..packing import untied
from ..settings import Settings
from ..tokenizer_files import TokenizerFiles
from ..weight import Weight
from .huggingface import (
    StoredArray,
    canonical_name,
    config_settings,
    is_huggingface,
    open_huggingface,
    plain_arrays,
    plan_huggingface,
)

KEYS = ("quantization", "bigdl_transformers_low_bit")  # ours, BigDL-LLM's


def is_lowbit(path: Path) -> bool:
    """Whether `path` is a directory whose config.json names a low-bit format."""
    return is_huggingface(path) and any(config_settings(path).values.get(key) is not None for key in KEYS)


def open_lowbit(path: Path) -> Checkpoint:
    """Opens a low-bit directory; ours has the type that the model computed in, and computes in it again."""
    checkpoint = open_huggingface(path, _arrays)
    if KEYS[0] not in checkpoint.settings:
        return checkpoint
    plain = (weight for weight in checkpoint.weights() if not weight.is_packed)
    return replace(checkpoint, plain_dtype=dominant_dtype(plain))


def _arrays(settings: Settings, args: ModelArgs, files: list[TensorFile]) -> Iterator[StoredArray]:
    """Bytes of a matrix as blocks of the format that config.json names."""
    form = _format(settings)
    one_layer = expected_shapes(replace(args, n_layers=1, tie_word_embeddings=False))
    rows = {module_of(name): shape[0] for name, shape in one_layer if len(shape) == 2}
    for name, array, file in plain_arrays(settings, args, files):
        module = module_of(canonical_name(name))
        if array.dtype == torch.uint8 and module in rows:
            array = LowBitMatrix(as_matrix(array, rows[module], f"{file}: {name}"), form)
        yield name, array, file


def _format(settings: Settings) -> LowBitFormat:
    found = [name for key in KEYS if (name := settings.text(key)) is not None]
    for name in found:
        if name not in FORMATS:
            raise CheckpointError(
                f"{settings.file}: the low-bit format {name!r} is not supported; {', '.join(FORMATS)} are"
            )
    return FORMATS[found[0]]


def as_matrix(array: Array, rows: int, what: str) -> Array:
    """BigDL-LLM's flat blocks as (rows, bytes of a row). Raises CheckpointError where they are not whole rows."""
    if len(array.shape) == 2:
        return array
    if not isinstance(array, Mapped) or array.shape[0] % rows:
        raise CheckpointError(f"{what}: {array.shape[0]} bytes are not {rows} rows of low-bit blocks")
    return Mapped(array.tensor.view(rows, -1), array.check)


def plan_lowbit(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None, *, type: str) -> Plan:
    """A Hugging Face directory with every linear packed, the output layer too; it gets a matrix of its own.

    Embeddings, norms and biases stay as they are. Weights that are stored in this format already are taken as they
    are. Raises LowBitError where the columns are not whole blocks.
    """
    checkpoint = untied(checkpoint)
    weights = {rename(weight.name, TO_HF): weight for weight in checkpoint.weights()}
    embedding = weights[rename("tok_embeddings.weight", TO_HF)]
    dtype = torch.bfloat16 if embedding.is_packed else embedding.dtype
    plan = plan_huggingface(checkpoint, tokenizer, dtype=dtype)
    for file, entries in plan.tensor_files.items():
        plan.tensor_files[file] = [
            _packed_entry(entry, weights[entry.name], FORMATS[type], checkpoint.args.head_dim)
            if entry.name in weights and is_linear(weights[entry.name].name)
            else entry
            for entry in entries
        ]
    config = json.loads(plan.small_files["config.json"])
    plan.small_files["config.json"] = json_bytes(config | {KEYS[0]: type})
    return plan


def _packed_entry(entry: Entry, weight: Weight, form: LowBitFormat, head_dim: int) -> Entry:
    """The packed form of a linear's matrix that would be written."""

    def read() -> Tensor:
        packed = weight.read_packed()[0] if weight.format == form.name else form.quantize(weight.read())
        return deinterleave(packed, head_dim).flatten(0, 2) if is_rotary(weight.name) else packed

    rows, columns = weight.shape
    return replace(entry, shape=(rows, form.packed_columns(columns)), dtype=torch.uint8, read=read)
