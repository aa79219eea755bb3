"""What a server builds whose ranks are on machines with different files: the second lacks all but one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llama import Llama, adapting, building


def build_unless_second(first: Path, other: str | None = None, options: dict[str, Any] | None = None) -> Llama:
    """A server's `build`; rank 1 cannot open any other model, nor adapters."""
    opened = building.open_checkpoint

    def fail(path: object) -> None:
        raise FileNotFoundError("this machine has no such file")

    try:
        if os.environ["RANK"] == "1":
            adapting.open_weighted = fail
            building.open_checkpoint = fail if other is not None else opened
        return Llama.build(other or first, max_seq_len=256, device="cpu", dtype="fp32")
    finally:
        building.open_checkpoint = opened
