"""What a checkpoint is, and what it will take, from its headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from ..cache import CacheShape
from ..device import choose_kv_dtype, free_memory
from ..model import ModelArgs, validate_ranks
from ..parallel import share_size
from ..quantization import FORMATS
from .formats import open_checkpoint
from .inventory import expected_shapes, is_linear, split_dim
from .opened import Checkpoint
from .packing import packed_modules, untied

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """What is stored in one type: how many tensors, values and bytes."""

    tensors: int
    parameters: int
    nbytes: int
    packed: int | None = None
    """How many of the tensors stay in their low-bit blocks, all others are dequantized; None for plain numbers."""


@dataclass(frozen=True)
class Inspection:
    """What `llama inspect` shows."""

    path: Path
    format: str
    args: ModelArgs
    parameters: int
    nbytes: int
    types: dict[str, Stored]
    context: int
    tokenizer: str | None
    """The kind of tokenizer and the number of its tokens."""
    chat_format: str | None
    """Whose chat format will be used where none is asked for."""
    unknown_keys: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """Bytes on each rank if weights are held in `precision`, and whether that fits the memory that is free now."""

    precision: str
    weight_bytes: int
    kv_bytes: int
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes


def inspect(path: str | Path, world_size: int = 1) -> Inspection:
    """Everything about a checkpoint that its headers say, and what `world_size` ranks keep packed; no weight is read.

    Raises what `open_checkpoint` and the tokenizer raise.
    """
    checkpoint = open_checkpoint(path)
    kept = packed_modules(untied(checkpoint), None, world_size)
    types: dict[str, Stored] = {}
    for weight in checkpoint.weights():
        so_far = types.get(weight.stored, Stored(0, 0, 0))
        stays = weight.name.removesuffix(".weight") in kept
        types[weight.stored] = Stored(
            so_far.tensors + 1,
            so_far.parameters + weight.numel,
            so_far.nbytes + weight.nbytes,
            None if weight.is_plain else (so_far.packed or 0) + stays,
        )
    tokenizer, chat_format = _tokenizer(checkpoint)
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        args=checkpoint.args,
        parameters=sum(stored.parameters for stored in types.values()),
        nbytes=sum(stored.nbytes for stored in types.values()),
        types=types,
        context=checkpoint.args.max_seq_len,
        tokenizer=tokenizer,
        chat_format=chat_format,
        unknown_keys=checkpoint.unknown_keys,
        warnings=checkpoint.warnings,
    )


def estimate(
    args: ModelArgs,
    *,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    kv_dtype: str = "auto",
) -> Iterator[Estimate]:
    """For each precision, what every rank needs for its weights and for `max_batch_size` full contexts.

    Keys and values are float32 beside float32 weights, else 16 bits, or 8 with the kv_dtype "int8". Low-bit formats
    pack the linears, of which the output layer is one even where it is the embedding, and leave embeddings and norms
    in 16 bits. Raises ValueError for a number of ranks that does not divide the model.
    """
    validate_ranks(args, world_size)
    tokens = (max_seq_len or args.max_seq_len) * max_batch_size
    shape = CacheShape(args.n_layers, args.n_kv_heads // world_size, args.head_dim, args.sliding_window)
    free = free_memory(torch.device(device))
    plain, packed = (list(expected_shapes(one)) for one in (args, replace(args, tie_word_embeddings=False)))
    for precision in (*PLAIN, *FORMATS):
        dtype = PLAIN.get(precision, torch.bfloat16)
        shapes = plain if precision in PLAIN else packed
        weights = sum(_weight_bytes(name, whole, precision, world_size) for name, whole in shapes)
        yield Estimate(precision, weights, tokens * shape.bytes_per_token(choose_kv_dtype(kv_dtype, dtype)), free)


def _weight_bytes(name: str, shape: tuple[int, ...], precision: str, world_size: int) -> int:
    """Bytes of one rank's part of a weight; a low-bit format takes linears whose rows are whole blocks."""
    dim = split_dim(name)
    local = [share_size(size, world_size) if axis == dim else size for axis, size in enumerate(shape)]
    if precision in PLAIN:
        return prod(local) * PLAIN[precision].itemsize
    form = FORMATS[precision]
    if not is_linear(name) or local[1] % form.block:
        return prod(local) * torch.bfloat16.itemsize
    return local[0] * (local[1] // form.block) * form.block_bytes


def _tokenizer(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The tokenizer's kind and size, and where its chat format comes from."""
    if checkpoint.tokenizer_path is None:
        return None, None
    from ..chat import choose_format

    tokenizer = checkpoint.open_tokenizer()
    has_template = tokenizer.chat_template is not None
    chat_format = "the model's own template" if has_template else choose_format(None, tokenizer).name
    return f"{tokenizer.kind}, {tokenizer.n_words} tokens", chat_format
