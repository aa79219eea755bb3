"""Which weights stay in low-bit blocks, and in which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..quantization import FORMATS, has_kernels
from .inventory import EMBEDDING, is_linear, split_dim
from .opened import Checkpoint
from .weight import Weight

DENSE = "none"  # the quantization that unpacks what is stored in blocks


def packed_modules(
    checkpoint: Checkpoint,
    quantization: str | None,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, str]:
    """Module name -> low-bit format, for every linear, and embedding, that is to be held packed.

    With a `quantization` these are all linears, the output layer included. With None they are those that keep the
    blocks that they are stored in. An embedding that is only looked up keeps them in both cases. With "none" there are
    none.

    Call it on what `untied` returns: an output layer that is the embedding is a linear of its own here.
    """
    if quantization == DENSE:
        return {}
    looked_up = None if checkpoint.args.tie_word_embeddings else EMBEDDING

    def format_of(weight: Weight) -> str | None:
        if quantization and is_linear(weight.name):
            return quantization
        may_stay = is_linear(weight.name) or weight.name == looked_up
        return weight.format if may_stay and keeps_blocks(weight, world_size, device) else None

    formats = ((weight.name.removesuffix(".weight"), format_of(weight)) for weight in checkpoint.weights())
    return {name: format for name, format in formats if format}


def keeps_blocks(weight: Weight, world_size: int = 1, device: torch.device | str = "cpu") -> bool:
    """Whether a matrix stays as it is stored: in blocks that kernels serve and that every rank gets whole.

    Where `device` has no kernels for them none does: unpacking at every product is slower than unpacking once.
    """
    if not (weight.format in FORMATS and has_kernels(weight.format, device)):
        return False
    columns = weight.shape[1] // (world_size if split_dim(weight.name) == 1 else 1)
    return columns % FORMATS[weight.format].block == 0


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with an output layer of its own, made of the same stored embedding.

    The embedding is looked up row by row and stays as it is; the output layer is a product and can be packed.
    """
    if not checkpoint.args.tie_word_embeddings or not checkpoint.has_head:
        return checkpoint

    def weights() -> Iterator[Weight]:
        for weight in checkpoint.weights():
            yield weight
            if weight.name == EMBEDDING:
                yield replace(weight, name="output.weight")

    return replace(checkpoint, args=replace(checkpoint.args, tie_word_embeddings=False), weights=weights)
