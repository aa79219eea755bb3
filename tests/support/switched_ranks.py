"""What a server builds whose ranks are on machines with different files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llama import Llama, building


def build_unless_second(first: Path, other: str | None = None, options: dict[str, Any] | None = None) -> Llama:
    """A server's `build`; rank 1 cannot open any other model."""
    opened = building.open_checkpoint

    def fail(path: object) -> None:
        raise FileNotFoundError("this machine has no such file")

    try:
        if other is not None and os.environ["RANK"] == "1":
            building.open_checkpoint = fail
        return Llama.build(other or first, max_seq_len=256, device="cpu", dtype="fp32")
    finally:
        building.open_checkpoint = opened
