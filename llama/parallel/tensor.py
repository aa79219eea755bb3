"""Tensor parallelism on fairscale: every matrix is cut, and each rank multiplies with its part.

NCCL carries CUDA tensors, gloo carries everything on the CPU. With one rank every collective is the identity, and
fairscale is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place among the `size` ranks that cut the same layers between them."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`; with several ranks `x` itself is overwritten."""
        if self.size == 1:
            return x
        from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

        return reduce_from_model_parallel_region(x)

    def all_gather(self, x: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """Every rank's `x` (..., n), joined along the last dimension: (..., n * size).

        With `length` these are all ranks' parts of that many, as `share` makes them: (..., length).
        """
        if self.size == 1:
            return x
        from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region

        if length is None or length % self.size == 0:
            return gather_from_model_parallel_region(x.contiguous())
        filled = F.pad(x, (0, share_size(length, self.size) - x.shape[-1]))
        return gather_from_model_parallel_region(filled)[..., :length].contiguous()


ALONE = TensorParallel()


def share_size(length: int, size: int) -> int:
    """How many of `length` rows each of `size` ranks has; the last one may have fewer."""
    return -(-length // size)


def share(length: int, rank: int, size: int) -> tuple[int, int]:
    """Where a rank's part of `length` rows starts and stops."""
    start = min(rank * share_size(length, size), length)
    return start, min(start + share_size(length, size), length)
