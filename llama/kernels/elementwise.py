"""What lies between a layer's products, each in one pass over its numbers: norm, rotation, gate.

Compiled on the CPU, in Triton on a GPU; elsewhere, and for other types and sizes, by PyTorch's operators, which define
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import library
from llama.kernels.cuda import serves_gpu
from llama.kernels.library import UNIT, operator, serves

_rms_norm, _rotate, _swiglu = (operator(name) for name in ("rms_norm", "rotate", "swiglu"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight, for each of x's rows (..., columns).

    Normalised in float32 and cast back before the product, as in the reference.
    """
    if serves(x) and weight.dtype == x.dtype:
        return _rms_norm(x, weight, eps)
    if serves_gpu(x) and weight.dtype == x.dtype:
        from llama.kernels.cuda import elementwise as gpu  # here, because Triton takes a moment to import

        return gpu.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, None, eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs (a, b) of x (num_tokens, heads, head_dim) become (a, b) * cos + (b, a) * sin.

    cos, sin: (num_tokens, 1, head_dim) float32. Computed in float32; the result has x's dtype.
    """
    if serves(x) and x.stride()[1:] == (x.shape[-1], 1):
        return _rotate(x, cos, sin)
    return rotate_twin(x, cos, sin)


def rotate_twin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by PyTorch's operators."""
    x32 = x.float()
    swapped = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x32 * cos).addcmul_(swapped, sin).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x (..., 2 * columns), the gate first: (..., columns). Shazeer 2020, arXiv:2002.05202."""
    if serves(x, 2 * UNIT):
        return _swiglu(x)
    if serves_gpu(x):
        from llama.kernels.cuda import elementwise as gpu

        return gpu.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


if library.AVAILABLE:

    @torch.library.register_fake("llama::rms_norm")
    def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("llama::rotate")
    def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("llama::swiglu")
    def _(x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
