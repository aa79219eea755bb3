"""The machine that a benchmark runs on: its own limits, and the memory of this process."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from llama.bench.machine import DTYPE, matrix_rate, processor, read_bandwidth

__all__ = ["DTYPE", "Memory", "anonymous_bytes", "machine", "matrix_rate", "processor", "read_bandwidth"]


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
