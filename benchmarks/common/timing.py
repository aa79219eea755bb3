"""Measuring side by side: sides take turns, and medians are compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median

__all__ = ["alternate", "median", "report", "seconds"]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Runs every side once to warm up, then in turns A B A B ...; each side returns its own figure."""
    for side in sides.values():
        side()
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def report(result: dict[str, object]) -> None:
    """The last line of every benchmark: all figures as JSON."""
    print(json.dumps(result))
