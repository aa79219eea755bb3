"""How much memory a process has allocated, to the byte."""

import ctypes
import sys
from collections.abc import Callable

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


_mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform.startswith("linux") else None
IS_KNOWN = _mallinfo2 is not None
"""Whether the C library tells: glibc does, from 2.33 on."""

if IS_KNOWN:
    _mallinfo2.restype = _Mallinfo2


def allocated() -> int:
    """Bytes that C and C++ hold; of Python's objects only those above 512 bytes."""
    found = _mallinfo2()
    return found.uordblks + found.hblkhd


def left_behind(call: Callable[[], object], times: int) -> float:
    """Bytes that a call does not give back, on average."""
    for _ in range(times):  # what is made once, and kept
        call()
    before = allocated()
    for _ in range(times):
        call()
    return (allocated() - before) / times
