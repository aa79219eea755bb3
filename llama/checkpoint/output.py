"""What every writer gets: a tensor to be written, read when its turn comes."""

from __future__ import annotations

import torch

from ..files.writing import Entry
from .weight import Weight


def output(weight: Weight, name: str, dtype: torch.dtype) -> Entry:
    """`weight` under another name and in another type."""
    return Entry(name, weight.shape, dtype, weight.read)
