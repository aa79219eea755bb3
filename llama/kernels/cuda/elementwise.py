"""What lies between a layer's products, each in one launch: a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATES = 1024  # that one program computes


@triton.jit
def rms_norm_kernel(x, weight, y, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    there = column < columns
    numbers = tl.load(x + row + column, mask=there, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, axis=0) / columns + eps)
    normalised = (numbers * scale).to(y.dtype.element_ty).to(tl.float32)  # rounded before the product
    product = normalised * tl.load(weight + column, mask=there, other=0).to(tl.float32)
    tl.store(y + row + column, product.to(y.dtype.element_ty), mask=there)


@triton.jit
def swiglu_kernel(x, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    gate = tl.load(x + row * 2 * columns + column, mask=there, other=0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * columns + column, mask=there, other=0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)  # rounded before the product
    tl.store(y + row * columns + column, (gate * up).to(y.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.elementwise.rms_norm`: x (..., columns), weight (columns,) of one dtype."""
    x = x.contiguous()
    y, columns = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 512))
    if x.numel():
        rms_norm_kernel[(x.numel() // columns,)](x, weight, y, columns, eps, BLOCK=block, num_warps=warps)
    return y


def swiglu(x: Tensor) -> Tensor:
    """See `kernels.elementwise.swiglu`: x (..., 2 * columns), the gate first -> (..., columns)."""
    x = x.contiguous()
    columns = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel():
        swiglu_kernel[(y.numel() // columns, triton.cdiv(columns, GATES))](x, y, columns, BLOCK=GATES)
    return y
