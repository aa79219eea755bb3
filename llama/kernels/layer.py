"""A layer as one compiled operator, on the CPU.

Beside one row of a small model the calls of a layer's operators, and the Python between them, take longer than their
work. What it computes is what these operators compute one after the other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.kernels import library

_compute_layer = library.operator("compute_layer")
COMPILED = _compute_layer is not None


class LayerProduct(NamedTuple):
    """What the operator multiplies with."""

    weight: Tensor  # (outputs, columns) as the layer's input; with a format: uint8, flat, in the kernels' layout
    bias: Tensor | None  # (outputs,) as the layer's input; with a format: float32
    format: str  # "" for plain numbers
    outputs: int


def compute_layer(
    h: Tensor,
    norms: Sequence[Tensor],
    eps: float,
    products: Sequence[LayerProduct],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    table: Tensor,
) -> Tensor:
    """h + attention, + feed-forward: (num_tokens, dim) bfloat16 or float32 -> as h, which is not changed.

    norms: the weights (dim,) of both, as h. products: of queries, keys and values side by side; of the attention's
    output; of gate and up side by side; of down. The rest is what `attend_rows` takes; `table` names every row, and
    keys and values are stored. Raises RuntimeError for other shapes and types.
    """
    weights, biases, formats, outputs = zip(*products, strict=True)
    stored = (keys, values, key_scale, value_scale)
    return _compute_layer(h, *norms, eps, weights, biases, formats, outputs, cos, sin, slots, *stored, table)


if COMPILED:

    @torch.library.register_fake("llama::compute_layer")
    def _(h: Tensor, *_: object) -> Tensor:
        return torch.empty_like(h)
