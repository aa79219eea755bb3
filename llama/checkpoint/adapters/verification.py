"""Whether an adapter is whole: what its config asks for, its parts, finite values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ...files.errors import CheckpointError, Finding
from . import open_adapter


def verify_adapter(path: Path) -> Iterator[Finding]:
    """Every number is read once. Whether it fits a base model is seen when it meets one."""
    try:
        adapter = open_adapter(path)
    except CheckpointError as error:
        yield Finding(False, path.name, str(error))
        return
    ranks = ", ".join(map(str, adapter.ranks)) or "none"
    yield Finding(True, path.name, f"{adapter.format} adapter of {len(adapter.low_rank)} modules, ranks: {ranks}")
    parts = {name: list(one.tensors()) for name, one in adapter.low_rank.items()}
    parts |= {name: [array.read(0, 0, array.shape[0])] for name, array in adapter.whole.items()}
    bad = [name for name, tensors in parts.items() if not all(bool(torch.isfinite(one).all()) for one in tensors)]
    yield from (Finding(False, name, "has values that are not finite") for name in bad)
    if not bad:
        yield Finding(True, path.name, "every value is finite")
