"""Several ranks that hold one model: who takes part, what each has of it, and how they hear of each other."""

from .group import SINGLE, ModelParallel, Signal, from_ints, to_ints
from .joining import num_launched, start
from .stage import Stage
from .tensor import ALONE, TensorParallel, share, share_size

__all__ = [
    "ALONE",
    "SINGLE",
    "ModelParallel",
    "Signal",
    "Stage",
    "TensorParallel",
    "from_ints",
    "num_launched",
    "share",
    "share_size",
    "start",
    "to_ints",
]
