"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the order of Meta's weights: pairs are neighbours."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama.kernels.elementwise import rotate


class RopeScaling(ABC):
    """How rotary frequencies are stretched beyond the length that a model was trained at: one frozen class a kind."""

    kind: ClassVar[str]  # as Hugging Face's config.json names it
    by_limit: ClassVar[bool] = False  # the stretch depends on how many tokens a request may reach
    factor: float  # by how much the longest wavelengths are stretched

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def salt(self, limit: int) -> bytes:
        """Requests share keys only where this is equal; `limit` is how many tokens one may reach."""
        return b""

    @abstractmethod
    def stretch(self, freqs: Tensor, theta: float, limits: Tensor | None) -> Tensor:
        """Radians per position of each pair, (head_dim / 2,), before and after.

        limits (num_tokens,): how many tokens each token's request may reach, None where nobody knows. Kinds that
        depend on them return (num_tokens, head_dim / 2).
        """


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Every frequency divided by `factor`."""

    kind: ClassVar[str] = "linear"
    factor: float

    def stretch(self, freqs: Tensor, theta: float, limits: Tensor | None) -> Tensor:
        return freqs / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Long wavelengths divided by `factor`, short ones kept, those between blended.

    Llama 3.1, `llama-models` `models/llama3/model.py`.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def stretch(self, freqs: Tensor, theta: float, limits: Tensor | None) -> Tensor:
        turns = self.original_max_seq_len / (2 * math.pi / freqs)  # over the length of training
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * freqs / self.factor + kept * freqs


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Frequencies of few turns divided by `factor`, those of many kept, a ramp over the pairs between; longer vectors.

    YaRN, Peng et al. 2023, arXiv:2309.00071.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0  # turns over the length of training from which on a frequency is kept
    beta_slow: float = 1.0  # and up to which it is divided
    attention_factor: float | None = None  # None: the paper's
    truncate: bool = True  # the ramp begins and ends at whole pairs

    @property
    def magnitude(self) -> float:
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    def stretch(self, freqs: Tensor, theta: float, limits: Tensor | None) -> Tensor:
        low, high = self._pair(self.beta_fast, freqs, theta), self._pair(self.beta_slow, freqs, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * freqs.shape[0] - 1)
        pairs = torch.arange(freqs.shape[0], device=freqs.device, dtype=freqs.dtype)
        divided = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
        return divided * freqs / self.factor + (1 - divided) * freqs

    def _pair(self, turns: float, freqs: Tensor, theta: float) -> float:
        """The pair, between whole ones, that turns so often over the length of training."""
        return freqs.shape[0] * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """By how much YaRN lengthens rotated vectors: the paper's rule, and the weight that some models give it."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """A larger base for longer requests ("dynamic NTK"); nothing changes up to the length of training.

    The base follows from the length that a request may reach (prompt and answer), and stays: keys are stored rotated,
    and all of a request's must have been rotated alike. Programs that follow the length so far mix bases instead.
    """

    kind: ClassVar[str] = "dynamic"
    by_limit: ClassVar[bool] = True
    factor: float
    original_max_seq_len: int

    def salt(self, limit: int) -> bytes:
        return b"limit %d" % limit if limit > self.original_max_seq_len else b""

    def stretch(self, freqs: Tensor, theta: float, limits: Tensor | None) -> Tensor:
        if limits is None:
            return freqs
        limits = limits.to(freqs.dtype).clamp_min(self.original_max_seq_len).unsqueeze(-1)
        head_dim = 2 * freqs.shape[0]
        growth = self.factor * limits / self.original_max_seq_len - (self.factor - 1)  # of the base, but for the power
        exponents = torch.arange(0, head_dim, 2, device=freqs.device, dtype=freqs.dtype) / (head_dim - 2)
        return freqs / growth**exponents


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    limits: Tensor | None = None,
) -> Tensor:
    """Radians per position of each pair: (head_dim / 2,), stretched as `scaling` says; see `RopeScaling.stretch`."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype)[: head_dim // 2] / head_dim
    freqs = 1.0 / theta**exponents
    return freqs if scaling is None else scaling.stretch(freqs, theta, limits)


def rope_factors(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """What `scaling` divides each frequency by: (head_dim / 2,) float32, as llama.cpp stores it."""
    plain, stretched = (rope_frequencies(head_dim, theta, kind, dtype=torch.float64) for kind in (None, scaling))
    return (plain / stretched).float()


def turning_rates(freqs: Tensor) -> Tensor:
    """Frequencies (..., head_dim / 2) as `Rotary.at` takes them: (..., head_dim), each with a minus and with a plus."""
    return torch.stack((-freqs, freqs), -1).flatten(-2)


@dataclass(frozen=True)
class Rotary:
    """A step's rotations in real numbers: with neighbouring pairs (a, b) of x and their angle t,
    (a, b) * (cos t, cos t) + (b, a) * (-sin t, sin t). Both (num_tokens, 1, head_dim) float32.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, rates: Tensor, magnitude: float = 1.0) -> Rotary:
        """positions (num_tokens,) int64; rates: what `turning_rates` makes; vectors grow by `magnitude`."""
        angles = (positions.unsqueeze(-1) * rates).unsqueeze(1)  # a minus in front of t leaves cos t as it is
        cos, sin = angles.cos(), angles.sin()
        if magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
        return cls(cos, sin)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates x (num_tokens, heads, head_dim) in float32; the result has x's dtype."""
        return rotate(x, self.cos, self.sin)
