"""Several ranks that hold one model: who takes part, what each has of it, and how they hear of each other."""

from .group import SINGLE, ModelParallel, Signal, from_ints, to_ints
from .heartbeat import Heartbeat
from .joining import num_launched, start
from .stage import Stage
from .tensor import ALONE, TensorParallel, share, share_size
from .watchdog import Watchdog, end_process

__all__ = [
    "ALONE",
    "SINGLE",
    "Heartbeat",
    "ModelParallel",
    "Signal",
    "Stage",
    "TensorParallel",
    "Watchdog",
    "end_process",
    "from_ints",
    "num_launched",
    "share",
    "share_size",
    "start",
    "to_ints",
]
