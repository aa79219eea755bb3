"""Where a model computes, in which numbers, and how much memory is there."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str) -> torch.device:
    """ "auto" is the accelerator that torch finds, else the CPU; under torchrun each rank has its own."""
    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    return place


def choose_dtype(dtype: str | torch.dtype, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"dtype is {dtype!r}: give auto, {', '.join(DTYPES)} or a torch dtype")
    if device.type != "cpu":
        return stored or torch.bfloat16
    if stored == torch.float32 or not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.float32
    return torch.bfloat16


def choose_kv_dtype(kv_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """What keys and values are stored in: "auto" is as the model computes, "int8" a quarter or half of that."""
    if kv_dtype not in ("auto", "int8"):
        raise ValueError(f"kv_dtype is {kv_dtype!r}: give auto or int8")
    return torch.int8 if kv_dtype == "int8" else model_dtype


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except FileNotFoundError:  # not Linux: what the machine has, half of which may well be in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def return_memory() -> None:
    """Gives back to the system what the C library keeps of freed memory; loading leaves much of it. Linux only."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc's; musl has none
