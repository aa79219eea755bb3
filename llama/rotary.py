"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the order of Meta's weights: pairs are neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llama.kernels.elementwise import rotate


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained at.

    `kind` is "linear" (every frequency divided by `factor`) or "llama3" (long wavelengths divided, short ones
    kept, those between blended; Llama 3.1, `llama-models` `models/llama3/model.py`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> torch.Tensor:
    """Radians per position of each pair: (head_dim / 2,) float32, stretched as `scaling` says."""
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2, device=device)[: head_dim // 2].float() / head_dim))
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    wavelengths = 2 * math.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_max_seq_len / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


@dataclass(frozen=True)
class Rotary:
    """A step's rotations in real numbers: with neighbouring pairs (a, b) of x and their angle t,
    (a, b) * (cos t, cos t) + (b, a) * (-sin t, sin t). Both (num_tokens, 1, head_dim) float32.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, positions: torch.Tensor, freqs: torch.Tensor) -> Rotary:
        """positions (num_tokens,), freqs (head_dim / 2,)"""
        angles = torch.outer(positions.float(), freqs).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates x (num_tokens, heads, head_dim) in float32; the result has x's dtype."""
        return rotate(x, self.cos, self.sin)
