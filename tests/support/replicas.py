"""Commands with replicas in processes of their own, and all that they begin."""

from __future__ import annotations

import ipaddress
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.meta_files import save_meta, save_tokenizer
from support.tiny import tiny_args, tiny_weights

ROOT = Path(__file__).parent.parent.parent
READY = re.compile(r"Serving \S+ at (http://[\d.:]+) \(open it in a browser to chat; Ctrl-C stops\)")


def save_replicated_model(directory: Path) -> Path:
    """A tiny checkpoint with its vocabulary, for contexts in which a stream takes seconds."""
    args = tiny_args(vocab_size=400, max_seq_len=4096, max_batch_size=32)
    save_tokenizer(directory / "tokenizer.model")
    return save_meta(directory / "model", args, tiny_weights(args))


class Command:
    """`llama`, or another module, with these arguments; what it writes on standard error is read line by line."""

    def __init__(self, *arguments: object, module: str = "llama"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", module, *map(str, arguments)]
        self.process = subprocess.Popen(
            line, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self.told = ""

    def read_until(self, pattern: re.Pattern[str]) -> re.Match[str]:
        while (found := pattern.search(self.told)) is None:
            line = self.process.stderr.readline()
            assert line, self.told
            self.told += line
        return found

    def read_all(self) -> str:
        self.told += self.process.stderr.read()
        return self.told

    @property
    def family(self) -> list[int]:
        """The process and all that it, or one of those, has begun."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (parent := parent_of(entry)) is not None:
                children.setdefault(parent, []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    @property
    def replicas(self) -> list[int]:
        return [
            pid for pid in self.family if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica")
        ]


def parent_of(entry: Path) -> int | None:
    """The parent of a process of /proc; None where it has ended meanwhile."""
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def listening(pids: list[int]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses on which these processes listen; those of version 4 as such. Source: Linux's proc(5), net/tcp."""
    own = set()
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            own |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                address = ipaddress.ip_address(packed)
                found.append(getattr(address, "ipv4_mapped", None) or address)
    return found


def wait_for_end(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that have not ended by then."""
    left = []
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([descriptor], [], [], seconds)[0]:
            left.append(pid)
        os.close(descriptor)
    return left


@contextmanager
def command(*arguments: object, module: str = "llama") -> Iterator[Command]:
    """A command, of which nothing is left at the end of the block."""
    running = Command(*arguments, module=module)
    try:
        yield running
    finally:
        family = running.family
        running.process.kill()
        running.process.wait()
        running.process.stderr.close()
        assert wait_for_end(family, 120) == []  # Ray's helpers look for their parents now and then
