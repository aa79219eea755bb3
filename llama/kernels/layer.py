"""Layers as one compiled operator, on the CPU: each, or all of a model.

Beside one row of a small model the calls of a layer's operators, and the Python between them, take longer than their
work. What it computes is what these operators compute one after the other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import ClassVar, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from llama.kernels import library
from llama.kernels.lowrank import LowRankRows

_compute_layer, _compute_layers = (library.operator(name) for name in ("compute_layer", "compute_layers"))
_keep_layers, _forget_layers = (library.operator(name) for name in ("keep_layers", "forget_layers"))
_keep_stores, _forget_stores = (library.operator(name) for name in ("keep_stores", "forget_stores"))
_keep_additions, _forget_additions = (library.operator(name) for name in ("keep_additions", "forget_additions"))
COMPILED = None not in (_compute_layer, _compute_layers, _keep_layers, _keep_stores, _keep_additions)
BLOCKED = "blocked"  # the format of plain numbers that are in oneDNN's own order


class LayerProduct(NamedTuple):
    """What the operator multiplies with."""

    weight: Tensor  # (outputs, columns) as the layer's input; with low bits: uint8, flat, in the kernels' layout
    bias: Tensor | None  # (outputs,) as the layer's input; with low bits: float32
    format: str  # "" for plain numbers; BLOCKED
    outputs: int


class LayerOperands(NamedTuple):
    """What layers compute with, one layer after the other: of each two norms and four products.

    The norms, (dim,) as the input, are that before attention and that before the feed-forward; the products are of
    queries, keys and values side by side, of the attention's output, of gate and up side by side, and of down.
    """

    norms: Sequence[Tensor]
    eps: float
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    formats: Sequence[str]
    outputs: Sequence[int]

    @classmethod
    def of(cls, norms: Sequence[Tensor], eps: float, products: Sequence[LayerProduct]) -> LayerOperands:
        """Of one layer."""
        return cls(norms, eps, *zip(*products, strict=True))

    @classmethod
    def joined(cls, layers: Sequence[LayerOperands]) -> LayerOperands:
        """Of several with one eps."""
        norms, _, *products = zip(*layers, strict=True)
        return cls(
            list(chain.from_iterable(norms)), layers[0].eps, *(list(chain.from_iterable(each)) for each in products)
        )


class Kept:
    """Tensors that the operator finds again by a number: to hand them over at every step takes as long as a layer."""

    keep: ClassVar[Callable[..., int]]
    forget: ClassVar[Callable[[int], None]]

    def __init__(self, *given: object):
        self.given = given
        self.number = type(self).keep(*given)
        finalize(self, type(self).forget, self.number).atexit = False

    def __reduce__(self) -> tuple:
        return type(self), self.given  # a copy has a number of its own


class KeptLayers(Kept):
    """What `LayerOperands` are made of, of all layers."""

    keep, forget = _keep_layers, _forget_layers


class KeptStores(Kept):
    """Keys, values and their scales: lists with one tensor a layer, as `attend_rows` takes it; scales may be none."""

    keep, forget = _keep_stores, _forget_stores


class KeptAdditions(Kept):
    """What adapters add to products: see `of`."""

    keep, forget = _keep_additions, _forget_additions

    @classmethod
    def of(cls, num_products: int, additions: Sequence[tuple[int, LowRankRows]]) -> KeptAdditions:
        """To products, by their place among those of all layers."""
        factors = [part for _, one in additions for part in one.factors]
        numbers = [(place, len(one.factors), len(one.layout), *one.layout) for place, one in additions]
        return cls(num_products, factors, list(chain.from_iterable(numbers)))


def compute_layer(
    h: Tensor,
    operands: LayerOperands,
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

    The rest is what `attend_rows` takes; `table` names every row, and keys and values are stored. Raises RuntimeError
    for other shapes and types.
    """
    stored = (keys, values, key_scale, value_scale)
    return _compute_layer(h, *operands.norms, *operands[1:], cos, sin, slots, *stored, table)


def compute_layers(
    h: Tensor,
    layers: KeptLayers,
    additions: KeptAdditions | None,
    stores: KeptStores,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    table: Tensor,
) -> Tensor:
    """The same of several layers, one behind the other, each with its keys and values."""
    number = 0 if additions is None else additions.number
    return _compute_layers(h, layers.number, number, stores.number, cos, sin, slots, table)


if COMPILED:

    @torch.library.register_fake("llama::compute_layer")
    def _(h: Tensor, *_: object) -> Tensor:
        return torch.empty_like(h)
