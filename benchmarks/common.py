"""What every benchmark shares: the machine's own limits, alternating measurements, ratios of medians."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llama.device import choose_dtype
from llama.linear import Linear

DTYPE = choose_dtype(
    "auto", torch.bfloat16, torch.device("cpu")
)  # what a model that is stored in 16 bits computes in


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Runs every side once to warm up, then in turns A B A B ...; each side returns its own figure."""
    for side in sides.values():
        side()
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def median(figures: list[float]) -> float:
    return statistics.median(figures)


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


def machine() -> dict[str, object]:
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            processor = next(
                (ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), processor
            )
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_GB_per_s": round(read_bandwidth() / 1e9, 1),
        "dtype": str(DTYPE).removeprefix("torch."),
        "matrix_TFLOP_per_s": round(matrix_rate() / 1e12, 3),
    }


class Peer:
    """Another engine in a child process of another interpreter; it answers each line of JSON with one."""

    def __init__(self, python: str, script: str, *arguments: object):
        command = [python, str(Path(__file__).with_name(script)), *map(str, arguments)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: object) -> dict:
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer ended with status {self.child.wait()} at {str(request)[:200]}")
        return json.loads(answer)

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()


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


def report(result: dict[str, object]) -> None:
    """The last line of every benchmark: all figures as JSON."""
    print(json.dumps(result))
