"""Measuring side by side: sides take turns, and medians are compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median

from llama.bench.timing import alternate

__all__ = ["alternate", "median", "report", "seconds"]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(result: dict[str, object]) -> None:
    """The last line of every benchmark: all figures as JSON."""
    print(json.dumps(result))
