"""The machine that a benchmark runs on: its own limits, and the memory of this process."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path

import torch

from llama.device import choose_dtype
from llama.linear import Linear

from .timing import seconds

DTYPE = choose_dtype("auto", torch.bfloat16, torch.device("cpu"))  # of a model that is stored in 16 bits


def read_bandwidth(buffer: torch.Tensor | None = None, repetitions: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the best of some sums over a large buffer."""
    if buffer is None:
        buffer = torch.ones(1 << 28)
        buffer.sum()
    return buffer.numel() * buffer.element_size() / min(seconds(buffer.sum) for _ in range(repetitions))


def matrix_rate(dtype: torch.dtype = DTYPE, repetitions: int = 5) -> float:
    """Operations per second of a product of 512 rows by a 2048 x 5632 matrix, prepared as the model's are."""
    linear = Linear(5632, 2048).to(dtype)
    linear.prepare()
    x = torch.randn(512, 5632, dtype=dtype)
    linear(x)
    return 2 * 512 * 2048 * 5632 / min(seconds(lambda: linear(x)) for _ in range(repetitions))


def processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            named = next((line for line in lines if line.startswith("model name")), None)
        if named:
            return named.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_GB_per_s": round(read_bandwidth() / 1e9, 1),
        "dtype": str(DTYPE).removeprefix("torch."),
        "matrix_TFLOP_per_s": round(matrix_rate() / 1e12, 3),
    }


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Memory:
    """`with Memory() as memory:` how far the anonymous resident memory grows; a thread looks every 2 ms."""

    def __enter__(self) -> Memory:
        self.before = anonymous_bytes()
        self.peak = self.held = 0  # bytes
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes() - self.before)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()
        self.held = anonymous_bytes() - self.before
        self.peak = max(self.peak, self.held)
