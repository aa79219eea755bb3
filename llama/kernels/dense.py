"""Products with a weight of plain numbers: `dense_linear`, compiled for the few rows of a decoding step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.library import operator, serves

_dense_linear = operator("dense_linear")


def serves_weight(weight: Tensor) -> bool:
    """Whether the compiled product takes it."""
    return _dense_linear is not None and serves(weight)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, variant: str = "auto") -> Tensor:
    """x @ weight.T + bias, all of one dtype: x (..., columns), weight (outputs, columns) -> (..., outputs).

    Up to 64 rows, 8 with AVX-512, by the kernel of the widest instruction set, which adds in float32; more rows, and
    whatever it does not take, by the matrix library. In the kernel a row's result does not depend on the others.
    `variant`: one of `library.instruction_sets()`, for any number of rows.
    """
    if serves_weight(weight) and x.dtype == weight.dtype:
        return _dense_linear(x, weight, bias, variant)
    return F.linear(x, weight, bias)


if _dense_linear is not None:

    @torch.library.register_fake("llama::dense_linear")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, variant: str) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
