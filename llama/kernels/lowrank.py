"""What adapters of low rank add to a product: `add_low_rank` for the few rows of a decoding step, and its twin.

`Factors` are held in one order for both: a as it is, and each part's b in panels of 16 columns, so that the kernel
reads all of it from front to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.library import UNIT, operator, serves

_add_low_rank = operator("add_low_rank")


class Part(NamedTuple):
    """Neighbouring outputs that some of the ranks change."""

    ranks: int
    column: int  # the first output
    columns: int


@dataclass(frozen=True)
class Factors:
    """a and b of several parts over one input. `numbers`: a (all ranks, in), then each b (panels, ranks, width)."""

    numbers: Tensor  # flat
    parts: tuple[Part, ...]
    width: int | None  # 16 in the kernel's order; None: each b is one panel, for PyTorch's operators

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]], columns: Sequence[int]) -> Factors:
        """Of pairs a (rank, in) and b (out, rank), each for the outputs from its number in `columns` on.

        Where the kernel serves them, float32 becomes bfloat16 if no bit is lost by that.
        """
        sizes = [pairs[0][0].shape[1], *(b.shape[0] for _, b in pairs)]
        is_served = _add_low_rank is not None and serves(pairs[0][0]) and all(size % UNIT == 0 for size in sizes)
        pieces = [a for a, _ in pairs]
        for _, b in pairs:
            pieces.append(b.unflatten(0, (-1, UNIT)).mT if is_served else b.mT)
        numbers = torch.cat([piece.flatten() for piece in pieces])
        if is_served and torch.equal(numbers.bfloat16().to(numbers.dtype), numbers):
            numbers = numbers.bfloat16()
        parts = (Part(b.shape[1], column, b.shape[0]) for (_, b), column in zip(pairs, columns, strict=True))
        return cls(numbers, tuple(parts), UNIT if is_served else None)

    @cached_property
    def layout(self) -> tuple[int, ...]:
        """The parts as the operator wants to know them."""
        return len(self.parts), *chain.from_iterable(self.parts)

    @property
    def ranks(self) -> int:
        return sum(part.ranks for part in self.parts)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """a (all ranks, in), and each part's b (ranks, columns): views, or copies where the order is the kernel's."""
        size = self.numbers.numel() - sum(part.ranks * part.columns for part in self.parts)
        a, *rest = self.numbers.to(dtype).split([size, *(part.ranks * part.columns for part in self.parts)])
        panels = (b.view(-1, part.ranks, self.width or part.columns) for b, part in zip(rest, self.parts, strict=True))
        return a.view(self.ranks, -1), [b.transpose(0, 1).flatten(1) for b in panels]


@dataclass(frozen=True)
class Group:
    """Some rows of a step, and what is added to them."""

    first_row: int
    num_rows: int
    factors: Factors

    def layout(self) -> tuple[int, ...]:
        """What the operator wants to know of it."""
        return self.first_row, self.num_rows, *self.factors.layout


class LowRankRows:
    """What is added to several groups of rows, in one call. All `factors` are in the kernel's order."""

    def __init__(self, groups: Sequence[Group], variant: str = "auto"):
        self.factors = [group.factors.numbers for group in groups]
        self.layout = [number for group in groups for number in group.layout()]
        self.variant = variant

    def apply(self, y: Tensor, x: Tensor) -> None:
        """Changes y (num_tokens, out), in place; x (num_tokens, in), both on the CPU, bfloat16 or float32.

        Sums are made in float32; a row's do not depend on the other rows.
        """
        _add_low_rank(y, x, self.factors, self.layout, self.variant)


def add_low_rank_twin(y: Tensor, x: Tensor, factors: Factors) -> None:
    """The same for rows y (rows, out) and x (rows, in) of one group, by PyTorch's operators; in x's type."""
    a, bs = factors.matrices(x.dtype)
    hidden = F.linear(x, a).split([part.ranks for part in factors.parts], dim=1)
    for h, b, part in zip(hidden, bs, factors.parts, strict=True):
        y[:, part.column : part.column + part.columns].addmm_(h, b)


if _add_low_rank is not None:

    @torch.library.register_fake("llama::add_low_rank")
    def _(y: Tensor, x: Tensor, factors: list[Tensor], layout: list[int], variant: str) -> None:
        return None
