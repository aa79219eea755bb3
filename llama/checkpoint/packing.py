"""Which weights stay in low-bit blocks, and in which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..quantization import FORMATS, has_kernels
from .load import split_dim
from .names import module_name
from .weight import Checkpoint, Weight

LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")
DENSE = "none"  # the quantization that unpacks what is stored in blocks


def packed_modules(
    checkpoint: Checkpoint,
    quantization: str | None,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, str]:
    """Module name -> low-bit format, for every linear that is to be held packed.

    With a `quantization` these are all linears, the output layer included. With None they are those that are stored
    in blocks of a format that kernels serve; where `device` has no kernels none are, because unpacking at every product
    is slower than unpacking once. With "none" there are none.

    Call it on what `untied` returns: an output layer that is the embedding is a linear of its own here.
    """
    if quantization == DENSE or (quantization is None and not has_kernels(device)):
        return {}
    modules = {}
    for weight in checkpoint.weights():
        is_linear = weight.name.endswith(".weight") and module_name(weight.name) in LINEARS
        if is_linear and (quantization or keeps_blocks(weight, world_size)):
            modules[weight.name.removesuffix(".weight")] = quantization or weight.stored.lower()
    return modules


def keeps_blocks(weight: Weight, world_size: int) -> bool:
    """Whether a weight is stored in blocks that kernels serve, and that every rank gets whole."""
    if not weight.is_packed or weight.stored.lower() not in FORMATS:
        return False
    columns = weight.shape[1] // (world_size if split_dim(weight.name) == 1 else 1)
    return columns % FORMATS[weight.stored.lower()].block == 0


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with an output layer of its own, made of the same stored embedding.

    Embeddings are looked up row by row and stay as they are; the output layer is a product and can be packed.
    """
    if not checkpoint.args.tie_word_embeddings:
        return checkpoint

    def weights() -> Iterator[Weight]:
        for weight in checkpoint.weights():
            yield weight
            if weight.name == "tok_embeddings.weight":
                yield replace(weight, name="output.weight")

    return replace(checkpoint, args=replace(checkpoint.args, tie_word_embeddings=False), weights=weights)
