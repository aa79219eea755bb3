"""What a constraint lets come, as bits: one an id, the lowest of a byte first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

NO_IDS = np.empty(0, np.int64)


def excluded_ids(masks: Sequence[bytes], vocab_size: int, device: torch.device) -> Tensor:
    """(rows, vocab_size) bool: what is not allowed. The bits travel packed to the device, and are looked up there."""
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).to(device)
    spread = _spread(device).take(packed.long())
    return spread.view(torch.bool).view(len(masks), -1)[:, :vocab_size]


@cache
def _spread(device: torch.device) -> Tensor:
    """(256,) int64: of each byte the bits that are not set, one a byte."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1 - bits).to(torch.uint8).view(torch.int64).squeeze(-1).to(device)


def allowed_ids(mask: bytes, vocab_size: int, most: int) -> np.ndarray:
    """The ids that are allowed, in order; none where there are more than `most`."""
    packed = np.frombuffer(mask, np.uint8)
    places = np.flatnonzero(packed)
    if len(places) > most:
        return NO_IDS
    bits = np.unpackbits(packed[places][:, None], axis=1, bitorder="little")
    ids = (places[:, None] * 8 + np.arange(8))[bits != 0]
    ids = ids[ids < vocab_size]
    return ids if len(ids) <= most else NO_IDS
