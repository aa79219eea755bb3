"""Where a model computes, in which numbers, and how much memory is there."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPELLINGS = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # torch's own too
UNKNOWN_MEMORY = 4 << 30  # bytes, where the system does not tell what is free


def choose_device(device: str) -> torch.device:
    """ "auto" is the accelerator that torch finds, else the CPU; under torchrun each rank has its own.

    Raises ValueError for a device that this machine or this torch does not have.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator else 0
    names = ["auto", "cpu"] + ([accelerator.type] if accelerator else [])
    if device == "auto":
        device = accelerator.type if accelerator else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: give {', '.join(names)}") from error
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type not in names:
        raise ValueError(f"device is {device!r}, but this torch finds none here: give {' or '.join(names)}")
    if chosen.type != "cpu" and (chosen.index or 0) >= count:
        raise ValueError(f"device is {chosen}, but there are {count}, counted from 0")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def choose_dtype(dtype: str | torch.dtype, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type to compute in; "auto" is as `stored`, on a CPU bfloat16 only where the processor computes in it."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in SPELLINGS:
        return SPELLINGS[dtype]
    if dtype != "auto":
        raise ValueError(f"dtype is {dtype!r}: give auto, {', '.join(SPELLINGS)} or a torch dtype")
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
    except FileNotFoundError:  # not Linux
        pass
    try:
        import psutil  # here, because it takes longer to import than Linux takes to answer

        return psutil.virtual_memory().available
    except (ImportError, AttributeError, OSError):  # a system that psutil does not know
        return UNKNOWN_MEMORY


def num_sharing(device: torch.device) -> int:
    """How many ranks take of the device's memory: under torchrun those of this machine, but a GPU is a rank's own."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def return_memory() -> None:
    """Gives back to the system what the C library keeps of freed memory; loading leaves much of it. Linux only."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc's; musl has none
