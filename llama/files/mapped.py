"""Files mapped into memory: every bound is checked before a view is made, and nobody vouches for the file."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from io import BufferedReader
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError

MADV_POPULATE_READ = 22  # linux/mman.h
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


def open_file(path: Path) -> BufferedReader:
    """`open(path, "rb")`, for ordinary files only: others might never end, or never begin.

    Raises CheckpointError for a git-lfs pointer too, a few lines of text that stand for a file that was not fetched.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: is no ordinary file")
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read by this user") from None
    if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
        file.close()
        raise CheckpointError(
            f"{path}: is a git-lfs pointer and not the file itself; fetch it with: git lfs install && git lfs pull"
        )
    return file


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
        raise CheckpointError(f"the file was {size} bytes long when it was opened and has {now} now; open it again")


def map_pages(tensor: Tensor) -> None:
    """Maps all pages of a contiguous tensor in a mapped file, in one call instead of by one fault for every 4 KB.

    Linux 5.14 and newer; elsewhere, and where the kernel declines, they come when they are touched.
    """
    if sys.platform == "linux" and tensor.nbytes > mmap.PAGESIZE:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_POPULATE_READ)
