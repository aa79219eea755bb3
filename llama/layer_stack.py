"""The layers of a model one behind the other: in one operator where that serves them all, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from llama.attention import LayerCache, StepCache
from llama.kernels.layer import KeptLayers, LayerOperands
from llama.linear import Counted, Joint
from llama.rotary import Rotary


class Layer(Protocol):
    """A `TransformerBlock`, as far as a stack knows it."""

    products: Sequence[Joint]

    def __call__(self, x: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, dim)"""

    def operands(self) -> LayerOperands | None:
        """For the operator that computes a layer; None where that cannot make one of the products."""


class LayerStack:
    """No module: the layers keep their names in their model. What the operator multiplies with is gathered once."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers
        self._num_set: int | None = None  # what `Counted` said when the rest was looked at
        self._kept: KeptLayers | None = None
        self._is_gathered = False
        self._added: list[object] = []  # what may change a product
        self._hooks: list[dict] = []

    def compute(self, h: Tensor, rotary: Rotary, caches: StepCache) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, dim); each layer stores the step's keys and values in its cache."""
        # a package has nothing kept: it calls one layer after the other
        if caches.computes_layers and (kept := self.kept()) is not None:
            return caches.compute_layers(h, kept, rotary)
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, rotary, cache)
        return h

    def kept(self) -> KeptLayers | None:
        """All layers' operands, as they are now; None where one has to be called: it is not whole, something is added
        to a product in this step, or somebody has hooked it."""
        if self._num_set != Counted.num_set:
            self._num_set, self._is_gathered = Counted.num_set, False
            joints = [joint for layer in self.layers for joint in layer.products]
            self._added = [joint.added for joint in joints if joint.added is not None]
            self._hooks = [hooks for layer in self.layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        if any(self._added) or any(self._hooks):
            return None
        if not self._is_gathered:
            self._kept, self._is_gathered = self._gather(), True
        return self._kept

    def _gather(self) -> KeptLayers | None:
        parts = [layer.operands() for layer in self.layers]
        return None if None in parts or not parts else KeptLayers(*LayerOperands.joined(parts))
