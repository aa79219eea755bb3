"""Numbers of fewer bits, or other types, inside bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(part: Tensor) -> Tensor:
    """A contiguous copy, always: what counts as contiguous already, a lone block's field, may begin at an odd byte or
    have odd strides in dimensions of one, and can then not be viewed as another type."""
    return part.clone(memory_format=torch.contiguous_format)


def halves(field: Tensor) -> Tensor:
    """float16 numbers by their bytes, uint8 (n, 2k) -> float32 (n, k)"""
    return field.view(torch.float16).float()


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes (n, 2k), of which the low four bits count -> (n, k): code j in the low half, j + k in the high."""
    low, high = codes.chunk(2, dim=-1)
    return (low & 15) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(n, k) -> (n, 2k), the inverse of `pack_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def pack_bits(bits: Tensor) -> Tensor:
    """Zeros and ones uint8 (..., 8k) -> (..., k), the first of eight in the lowest bit."""
    bits = bits.unflatten(-1, (-1, 8))
    packed = bits[..., 0].clone()
    for i in range(1, 8):
        packed |= bits[..., i] << i
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """(..., k) -> (..., 8k), the inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)
