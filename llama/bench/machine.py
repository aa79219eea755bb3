"""The machine that is measured: what it is, how fast it reads memory and multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..device import choose_device, choose_dtype, free_memory
from ..kernels.library import instruction_sets
from ..linear import Linear

CPU = torch.device("cpu")
DTYPE = choose_dtype("auto", torch.bfloat16, CPU)  # in which a model that is stored in 16 bits computes on this CPU
BUFFER = 1 << 28  # floats, 1 GiB: more than any cache between memory and the cores holds


@dataclass(frozen=True)
class Limits:
    """What no program can beat on this machine; rates as measured just now, of a device's best of some tries."""

    processor: str
    instruction_sets: list[str]
    device: str
    threads: int
    memory_GB: float  # that is free
    torch: str
    dtype: str
    read_GB_per_s: float
    read_GB_per_s_one_thread: float | None  # None: not a CPU
    matrix_TFLOP_per_s: float
    matrix_TFLOP_per_s_one_thread: float | None


def measure_limits(device: str = "auto", threads: int | None = None) -> Limits:
    """Takes some seconds and 1 GiB. Raises ValueError for a device that is not here."""
    where = choose_device(device)
    dtype = choose_dtype("auto", torch.bfloat16, where)
    many = threads or torch.get_num_threads()
    rates = {}
    for count in (1, many):
        with num_threads(count):
            rates[count] = (read_bandwidth(device=where) / 1e9, matrix_rate(dtype, device=where) / 1e12)
    alone = rates[1] if where.type == "cpu" else (None, None)
    return Limits(
        processor=processor() if where.type == "cpu" else torch.cuda.get_device_name(where),
        instruction_sets=instruction_sets(),
        device=str(where),
        threads=many,
        memory_GB=round(free_memory(where) / 1e9, 1),
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        read_GB_per_s=round(rates[many][0], 1),
        read_GB_per_s_one_thread=alone[0] and round(alone[0], 1),
        matrix_TFLOP_per_s=round(rates[many][1], 3),
        matrix_TFLOP_per_s_one_thread=alone[1] and round(alone[1], 3),
    )


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def least_seconds(work: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """The least of some tries after one that warms up, each until the device has done it."""
    found = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def read_bandwidth(repetitions: int = 5, device: torch.device = CPU, buffer: torch.Tensor | None = None) -> float:
    """Bytes per second that all threads together read from memory: the best of some sums over a large buffer."""
    if buffer is None:
        buffer = torch.ones(BUFFER, device=device)
    return buffer.numel() * buffer.element_size() / least_seconds(buffer.sum, repetitions, device)


def matrix_rate(dtype: torch.dtype = DTYPE, repetitions: int = 5, device: torch.device = CPU) -> float:
    """Operations per second of a product of 512 rows by a 2048 x 5632 matrix, prepared as the model's are."""
    linear = Linear(5632, 2048).to(device, dtype)
    linear.prepare()
    x = torch.randn(512, 5632, dtype=dtype, device=device)
    with torch.inference_mode():
        return 2 * 512 * 2048 * 5632 / least_seconds(lambda: linear(x), repetitions, device)


def processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            named = next((line for line in lines if line.startswith("model name")), None)
        if named:
            return named.split(":")[1].strip()
    return platform.processor() or platform.machine()
