"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the order of Meta's weights: pairs are neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from llama.kernels.elementwise import rotate


class RopeScaling(Protocol):
    """How rotary frequencies are stretched beyond the length that a model was trained at: one frozen class a kind."""

    kind: ClassVar[str]  # as Hugging Face's config.json names it
    factor: float  # by how much the longest wavelengths are stretched

    def stretch(self, freqs: torch.Tensor) -> torch.Tensor:
        """Radians per position of each pair, (head_dim / 2,), before and after."""


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor`."""

    kind: ClassVar[str] = "linear"
    factor: float

    def stretch(self, freqs: torch.Tensor) -> torch.Tensor:
        return freqs / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, those between blended.

    Llama 3.1, `llama-models` `models/llama3/model.py`.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def stretch(self, freqs: torch.Tensor) -> torch.Tensor:
        turns = self.original_max_seq_len / (2 * math.pi / freqs)  # over the length of training
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * freqs / self.factor + kept * freqs


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Radians per position of each pair: (head_dim / 2,), stretched as `scaling` says."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype)[: head_dim // 2] / head_dim
    freqs = 1.0 / theta**exponents
    return freqs if scaling is None else scaling.stretch(freqs)


def rope_factors(head_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """What `scaling` divides each frequency by: (head_dim / 2,) float32, as llama.cpp stores it."""
    plain, stretched = (
        rope_frequencies(head_dim, theta, kind, dtype=torch.float64) for kind in (None, scaling)
    )
    return (plain / stretched).float()


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
