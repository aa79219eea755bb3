"""Measuring side by side: sides take turns, and medians are compared."""

from __future__ import annotations

from collections.abc import Callable


def alternate(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Runs every side once to warm up, then in turns A B A B ...; each side returns its own figure."""
    for side in sides.values():
        side()
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures
