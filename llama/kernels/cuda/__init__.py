"""The same operators on a GPU, in Triton: one file for each file of the folder above.

`attention`: rotating, storing, and rows that look at their own keys and values, block by block. `elementwise`: norm and
gate in one pass each. `lowbit`: products with packed weights. Importing one of them imports Triton, which takes a
moment; `has_triton` tells whether it is there. `TRITON_INTERPRET=1`, set before that, runs them on CPU tensors, slowly,
for tests.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def serves_gpu(x: torch.Tensor) -> bool:
    """Whether these operators take x: on a GPU, in their types, where Triton is installed."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and has_triton()
