"""Linear layers, and how those that share an input become one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

PACK_ROWS = 32  # the number of activation rows for which oneDNN chooses its weight layout


def in_tiles(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`product` over tiles of exactly `num_rows` rows of x (rows, in_features), the last one filled up.

    A product's low bits depend on how many rows it has, but not on which row stands where: with one fixed number a
    row gets the same bits whatever else is in the step.
    """
    filled = F.pad(x, (0, 0, 0, -len(x) % num_rows))
    return torch.cat([product(tile) for tile in filled.split(num_rows)])[: len(x)]


class Linear(nn.Module):
    """`x @ weight.T + bias`, weight (out_features, in_features).

    A weight that only `forward` reads can be handed to `prepare`, which stores it in the order that the
    processor multiplies fastest; `weight` is None from then on.
    """

    kind = "plain"  # linears of one kind can be joined

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: torch.Tensor | None = None
        self.fixed_rows: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, in_features) -> (num_tokens, out_features)"""
        if self.fixed_rows is not None:
            return in_tiles(self._product, x, self.fixed_rows)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def prepare(self, fixed_rows: int | None = None) -> None:
        """On a CPU that has instructions for bfloat16: replaces `weight` by oneDNN's own blocked copy of it.

        With `fixed_rows`, products are made in tiles of that many rows (see `in_tiles`).
        """
        self.fixed_rows = fixed_rows
        is_bfloat16 = self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu"
        if is_bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK_ROWS)
            self.weight = None

    @classmethod
    def join(cls, linears: Sequence[Linear]) -> Linear:
        """One linear over all their rows. Their weights become row views of its weight (one copy is made)."""
        joint = cls(linears[0].in_features, sum(linear.out_features for linear in linears))
        sizes = [linear.out_features for linear in linears]
        joint.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        for linear, rows in zip(linears, joint.weight.split(sizes), strict=True):
            linear.weight = nn.Parameter(rows, requires_grad=False)
        if linears[0].bias is not None:
            joint.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
        return joint

    def join_in(self, joint: Linear) -> None:
        """Gives up the own weight where `joint`, which it was joined into, no longer has a plain one."""
        if joint.weight is None:
            self.weight = None


class Joint:
    """Linears over one input: separate names, one product.

    Not a module, so that its parts keep their own names (`wq`, `wk`, `wv`) in `owner`'s state dict. Until `prepare`,
    and where the parts are of different kinds, each is multiplied by itself.
    """

    def __init__(self, owner: nn.Module, *names: str):
        self.owner = owner
        self.names = names
        self.joint: nn.Module | None = None

    @property
    def linears(self) -> list[nn.Module]:
        return [getattr(self.owner, name) for name in self.names]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, in_features) -> (num_tokens, sum of the parts' out_features)"""
        if self.joint is None:
            return torch.cat([linear(x) for linear in self.linears], dim=-1)
        return self.joint(x)

    def prepare(self, fixed_rows: int | None = None) -> None:
        linears = self.linears
        if len({linear.kind for linear in linears}) > 1:
            for linear in linears:
                linear.prepare(fixed_rows)
            return
        self.joint = linears[0].join(linears)
        self.joint.prepare(fixed_rows)
        for linear in linears:
            linear.join_in(self.joint)
