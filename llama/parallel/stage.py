"""Pipeline parallelism: a model's layers are cut into stages, and a step's rows travel from one to the next.

One step is under way at a time, so that stages make room for a larger model and no step faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Stage:
    """One rank's place in the ring of stages; what the last one computed comes back to the first.

    Each rank of a stage sends to the rank of the same place in the next one. `before` and `after` are counted over all
    processes. What is empty does not travel.
    """

    number: int = 0
    count: int = 1
    before: int = 0
    after: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm and the output layer."""
        return self.number == self.count - 1

    def layers(self, n_layers: int) -> range:
        """Which of the model's layers it runs: stages differ by one at most, and the last, with its output, has fewer.

        Raises ValueError where some stage would have none.
        """
        if self.count > n_layers:
            raise ValueError(
                f"pipeline_parallel_size is {self.count}, but the model has {n_layers} layers: each stage needs one"
            )
        each, more = divmod(n_layers, self.count)
        start = self.number * each + min(self.number, more)
        return range(start, start + each + (self.number < more))

    def send(self, x: torch.Tensor) -> None:
        """To the next stage."""
        if x.numel():
            dist.send(x.contiguous(), self.after)

    def receive(self, *size: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the stage before sends, of this size, on the device of `like` and in its type, or in `dtype`."""
        x = torch.empty(size, dtype=dtype or like.dtype, device=like.device)
        if x.numel():
            dist.recv(x, self.before)
        return x
