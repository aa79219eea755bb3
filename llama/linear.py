"""Linear layers: what one is, the plain one, and how those that share an input become one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from llama.kernels.dense import dense_linear, serves_weight
from llama.kernels.layer import BLOCKED, LayerProduct

BLOCKED_ROWS = 32  # the number of activation rows for which oneDNN chooses its weight layout


class AnyLinear(Protocol):
    """What a model multiplies with: `Linear`, `LowBitLinear`. A module, whose name in the model is its weight's."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    @property
    def kind(self) -> str:
        """How the weight is held; linears of one kind, with one input, can be joined."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, in_features) -> (num_tokens, out_features), in x's dtype"""

    def for_layer(self) -> LayerProduct | None:
        """For the operator that computes a layer; None where that cannot make this product."""

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 (out_features, in_features)."""

    def prepare(self, fixed_rows: int | None = None) -> Self:
        """After loading: stores the weight, in its own place, in the layout that its product reads fastest.

        With `fixed_rows` a row's result does not depend on which other rows there are.
        """

    def join(self, linears: Sequence[Self]) -> Self:
        """A new linear over all rows of `linears`, none of them prepared; their weights are copied once."""

    def join_in(self, joint: Self, rows: slice) -> None:
        """Gives up the own weight: it is these rows of `joint`, which is prepared. The state dict still has it."""


class StoredWeight(Protocol):
    """What a checkpoint gives a module to load: one rank's part of a weight, not read yet."""

    @property
    def format(self) -> str | None:
        """The low-bit format that it is stored in; None for numbers."""

    def read(self) -> torch.Tensor:
        """The weight as numbers, on the CPU."""

    def read_packed(self) -> tuple[torch.Tensor, str]:
        """Its blocks, uint8 (rows, bytes of a row), on the CPU, and the name of the stored type."""


@runtime_checkable
class LoadsItself(Protocol):
    """A module that makes its own of stored weights; of all others the parameters are replaced."""

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names that it wants, with their shapes in numbers, as this rank holds them."""

    def load_weight(self, name: str, weight: StoredWeight, device: torch.device, dtype: torch.dtype | None) -> None:
        """Takes this rank's part of one; `dtype` is what plain weights are held in. Called from several threads."""


def in_tiles(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`product` over tiles of exactly `num_rows` rows of x (rows, in_features), the last one filled up.

    A product's low bits depend on how many rows it has, but not on which row stands where: with one fixed number a
    row gets the same bits whatever else is in the step.
    """
    filled = F.pad(x, (0, 0, 0, -len(x) % num_rows))
    return torch.cat([product(tile) for tile in filled.split(num_rows)])[: len(x)]


class Counted:
    """Counts how often any of its kind was given another part: who gathered their weights looks at `num_set` alone.

    To look at all of them, at every step, would take as long as a layer.
    """

    num_set = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Counted.num_set += 1


class CountedModule(Counted, nn.Module):
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        Counted.num_set += 1  # `to` and the like put other tensors into their places
        return super()._apply(fn, recurse)


class Linear(CountedModule):
    """`x @ weight.T + bias`, weight (out_features, in_features).

    `prepare` may store the weight in the order that the processor multiplies fastest; `weight` is None from then on.
    `plain`, and with it `state_dict`, always gives it in its own order; weights are loaded before `prepare`.
    """

    kind = "plain"

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.blocked: torch.Tensor | None
        self.register_buffer("blocked", None, persistent=False)
        self.joined: tuple[Linear, slice] | None = None  # what holds the weight, and where; no child of this module
        self.fixed_rows: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, in_features) -> (num_tokens, out_features)"""
        if self.fixed_rows is not None:
            return in_tiles(self._product, x, self.fixed_rows)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        blocked = self._buffers["blocked"]  # nn.Module looks among its buffers last
        if blocked is None:
            return dense_linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, blocked, self.bias, "none", [], "")

    def prepare(self, fixed_rows: int | None = None) -> Self:
        """On a CPU that has instructions for bfloat16: replaces `weight` by oneDNN's own blocked copy of it.

        With `fixed_rows`, products are made in tiles of that many rows (see `in_tiles`).
        """
        self.fixed_rows = fixed_rows
        is_bfloat16 = self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu"
        if is_bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight, BLOCKED_ROWS)
            self.weight = None
        return self

    @classmethod
    def join(cls, linears: Sequence[Linear]) -> Linear:
        """One linear over all their rows. What they hold becomes row views of what it holds (one copy is made)."""
        joint = cls(linears[0].in_features, sum(linear.out_features for linear in linears))
        sizes = [linear.out_features for linear in linears]
        for name in ("weight", "bias") if linears[0].bias is not None else ("weight",):
            whole = torch.cat([linear.get_parameter(name) for linear in linears])
            setattr(joint, name, nn.Parameter(whole, requires_grad=False))
            for linear, rows in zip(linears, whole.split(sizes), strict=True):
                setattr(linear, name, nn.Parameter(rows, requires_grad=False))
        return joint

    def join_in(self, joint: Linear, rows: slice) -> None:
        """Gives up the own weight where `joint`, which it was joined into, no longer has a plain one."""
        if joint.weight is None:
            self.weight, self.joined = None, (joint, rows)

    def for_layer(self) -> LayerProduct | None:
        """See `AnyLinear.for_layer`."""
        if self.fixed_rows is not None:
            return None
        weight = self._parameters["weight"]  # a small model waits for what nn.Module does to find self.weight
        if weight is None:
            blocked = self._buffers["blocked"]
            return None if blocked is None else LayerProduct(blocked, self.bias, BLOCKED, self.out_features)
        if not serves_weight(weight):
            return None
        return LayerProduct(weight, self.bias, "", self.out_features)

    def plain(self, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the weight in their own order: a copy where only the processor's order is held, else a view."""
        if self.weight is not None:
            return self.weight[rows]
        if self.joined is not None:
            joint, of_joint = self.joined
            return joint.plain(of_joint)[rows]
        return self.blocked.to_dense()[rows].clone()

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 (out_features, in_features)."""
        return self.plain().float()

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is None:
            destination[prefix + "weight"] = self.plain()

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.weight is None:
            args[-1].append(f"{prefix}weight is prepared for its product; weights are loaded before `prepare`")


class Joint(Counted):
    """A product of a layer: linears over one input, with separate names and one result. It may have one part only.

    Not a module, so that its parts keep their own names (`wq`, `wk`, `wv`) in `owner`'s state dict. Until `prepare`,
    and where the parts are of different kinds, each is multiplied by itself.
    """

    def __init__(self, owner: nn.Module, *names: str):
        self.siblings = owner._modules  # and not `owner`: weights in a circle would outlive their model
        self.names = names
        self.joint: AnyLinear | None = None
        self.added: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # changes y that was made of x;
        # false in a step in which it changes nothing

    @property
    def linears(self) -> list[AnyLinear]:
        return [self.siblings[name] for name in self.names]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, in_features) -> (num_tokens, sum of the parts' out_features)"""
        if self.joint is None:
            results = [linear(x) for linear in self.linears]
            y = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        else:
            y = self.joint(x)
        return self.added(y, x) if self.added else y

    def for_layer(self) -> LayerProduct | None:
        """See `AnyLinear.for_layer`; without what is `added`."""
        return None if self.joint is None else self.joint.for_layer()

    def prepare(self, fixed_rows: int | None = None) -> None:
        """Joins the parts, or each with itself where they are of different kinds, and prepares the result."""
        linears = self.linears
        if len(linears) == 1:
            self.joint = linears[0].prepare(fixed_rows)
        elif len({linear.kind for linear in linears}) > 1:
            for linear in linears:
                linear.prepare(fixed_rows)
        else:
            self.joint = linears[0].join(linears).prepare(fixed_rows)
            first = 0
            for linear in linears:
                linear.join_in(self.joint, slice(first, first + linear.out_features))
                first += linear.out_features
