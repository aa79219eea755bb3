"""The layers of a model one behind the other: in one operator where that serves them all, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Protocol

import torch
from torch import Tensor, nn

from llama.attention import LayerCache, StepCache
from llama.kernels.layer import LayerOperands
from llama.linear import Joint
from llama.rotary import Rotary


class Layer(Protocol):
    """A `TransformerBlock`, as far as a stack knows it."""

    attention_norm: nn.Module
    ffn_norm: nn.Module
    products: Sequence[Joint]

    def __call__(self, x: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, dim)"""

    def operands(self) -> LayerOperands | None:
        """For the operator that computes a layer; None where that cannot make one of the products."""


class LayerStack:
    """No module: the layers keep their names in their model. What the operator multiplies with is gathered once."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers
        self.joints = [joint for layer in layers for joint in layer.products]
        self._operands: LayerOperands | None = None
        self._places: list[dict[str, Tensor]] = []  # where each weight stood, under its name
        self._weights: list[Tensor] = []  # and which it was

    def compute(self, h: Tensor, rotary: Rotary, caches: StepCache) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, dim); each layer stores the step's keys and values in its cache."""
        # a package calls one layer after the other: it would not know which tensors of a list were changed
        if caches.computes_layers and not torch.compiler.is_exporting():
            operands = self.operands()
            if operands is not None:
                return caches.compute_layers(h, operands, rotary)
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, rotary, cache)
        return h

    def operands(self) -> LayerOperands | None:
        """Of all layers, as they are now; None where one has to be called: it is not whole, something is added to a
        product in this step, or somebody has hooked it."""
        # maps, whose loops are not the interpreter's: this is asked at every step
        is_changed = any(map(attrgetter("added"), self.joints))
        if is_changed or any(map(any, map(attrgetter("_forward_hooks", "_forward_pre_hooks"), self.layers))):
            return None
        if not (self._operands and all(map(is_, map(itemgetter("weight"), self._places), self._weights))):
            self._operands = self._gather()
        return self._operands

    def _gather(self) -> LayerOperands | None:
        parts = []
        for layer in self.layers:
            if (part := layer.operands()) is None:
                return None
            parts.append(part)
        if not parts:
            return None
        operands = LayerOperands.joined(parts)
        norms = [norm for layer in self.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        modules = [*norms, *(joint.joint for joint in self.joints)]
        self._places = [one._parameters if "weight" in one._parameters else one._buffers for one in modules]
        self._weights = [*operands.norms, *operands.weights]
        return operands
