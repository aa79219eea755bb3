"""Reading files that nobody vouches for: mapped memory with checked bounds, JSON with checked types."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError

MAX_JSON_BYTES = 16 << 20


class MappedFile:
    """A file mapped privately into memory (a write through it never reaches the disk).

    Every view is checked against the file's length, in Python's unbounded integers, before it is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            self.buffer = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)

    def check(self) -> None:
        """Raises if the file has shrunk since it was mapped, since the lost pages cannot be touched any more."""
        check_size(self.path, self.size)

    def tensor(self, name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A view of the mapped bytes at `offset`; a copy only where they are not aligned for `dtype`."""
        nbytes = prod(shape) * dtype.itemsize
        if offset < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path}: {name}: bytes {offset} to {offset + nbytes} lie outside the file of {self.size} bytes"
            )
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self.buffer, dtype=torch.uint8, count=nbytes, offset=offset)
        if offset % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(shape)


def open_file(path: Path) -> BinaryIO:
    """`open(path, "rb")`, for ordinary files only: others might never end, or never begin."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: is no ordinary file")
    try:
        return open(path, "rb")
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read by this user") from None


def size_check(path: Path) -> Callable[[], None]:
    """A function that raises once `path` has become shorter than it is now."""
    size = os.stat(path).st_size
    return lambda: check_size(path, size)


def check_size(path: Path, size: int) -> None:
    """Raises if `path` is gone or shorter than `size` bytes."""
    try:
        now = os.stat(path).st_size
    except FileNotFoundError:
        return  # unlinked or replaced: the mapping keeps the old file alive
    if now < size:
        raise CheckpointError(
            f"the file was {size} bytes long when it was opened and has {now} now; open it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; no duplicate keys, no NaN, no bottomless nesting."""
    with open_file(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    return parse_json(data, path)


def parse_json(data: bytes, path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`data` as a JSON object of at most `limit` bytes; `path` is named in errors."""
    if len(data) > limit:
        raise CheckpointError(f"{path}: more than {limit >> 20} MB of JSON")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also JSONDecodeError, UnicodeDecodeError
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
