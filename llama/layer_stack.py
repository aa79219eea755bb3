"""The layers of a model one behind the other: in one operator where that serves them all, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from llama.attention import LayerCache, StepCache
from llama.kernels.layer import KeptAdditions, KeptLayers, LayerOperands
from llama.linear import Counted, Joint
from llama.lora import MOST_PLANS, Site, StepRows
from llama.rotary import Rotary


class Layer(Protocol):
    """A `TransformerBlock`, as far as a stack knows it."""

    products: Sequence[Joint]

    def __call__(self, x: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, dim)"""

    def operands(self) -> LayerOperands | None:
        """For the operator that computes a layer, without what is added to products; None where it cannot make one."""


class StepOperands(NamedTuple):
    """What the operator for all layers computes with in a step."""

    layers: KeptLayers
    additions: KeptAdditions | None = None


class LayerStack:
    """No module: the layers keep their names in their model. What the operator multiplies with is gathered once."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers
        self._num_set: int | None = None  # what `Counted` said when the rest was looked at
        self._hooks: list[dict] = []
        self._rows: list[StepRows] = []  # which tell who changes products in a step
        self._plans: dict[tuple, StepOperands | None] = {}
        self._kept: KeptLayers | None = None

    def compute(self, h: Tensor, rotary: Rotary, caches: StepCache) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, dim); each layer stores the step's keys and values in its cache."""
        # a package has nothing kept: it calls one layer after the other
        if caches.computes_layers and (plan := self.plan(h.shape[0])) is not None:
            return caches.compute_layers(h, *plan, rotary)
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, rotary, cache)
        return h

    def plan(self, num_rows: int) -> StepOperands | None:
        """For a step of so many rows; None where layers have to be called: one is not whole, somebody has hooked it, or
        a product is changed in a way that the operator does not know."""
        if self.is_hooked:
            return None
        step = (num_rows, *[rows.runs for rows in self._rows]) if self._rows else ()
        if step not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[step] = self._planned(num_rows)
        return self._plans[step]

    @property
    def is_hooked(self) -> bool:
        """Whether somebody wants to be called with a layer, which then has to be called itself."""
        if self._num_set != Counted.num_set:
            self._look()
        return any(self._hooks)

    def _look(self) -> None:
        self._num_set = Counted.num_set
        self._hooks = [hooks for layer in self.layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._rows = list({id(site.rows): site.rows for site in self._added() if isinstance(site, Site)}.values())
        self._plans = {}
        parts = [layer.operands() for layer in self.layers]
        self._kept = None if None in parts or not parts else KeptLayers(*LayerOperands.joined(parts))

    def _added(self) -> list[object]:
        """What may change each product, of all layers."""
        return [joint.added for layer in self.layers for joint in layer.products]

    def _planned(self, num_rows: int) -> StepOperands | None:
        if self._kept is None:
            return None
        added, additions = self._added(), []
        for place, site in enumerate(added):
            if site:
                changes = site.additions(num_rows) if isinstance(site, Site) else None
                if changes is None:
                    return None
                additions += [(place, change) for change in changes]
        return StepOperands(self._kept, KeptAdditions.of(len(added), additions) if additions else None)
