"""Runs checks of damaged files in a process of its own, whose death is a finding and whose memory is bounded."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import CheckpointError, open_checkpoint
from support.checkpoints import state

MEMORY = 512 << 20  # bytes of address space beyond what the process has when it starts
SECONDS = 5.0  # for one damaged file


def check(path: Path, expected: dict[str, Tensor] | None) -> str | None:
    """What is wrong about how the damaged checkpoint at `path` is handled; None if nothing is.

    Right is a clear error, or a state whose names and shapes no model with the config would take, or the expected
    values (None: any).
    """
    began = time.monotonic()
    try:
        found = state(open_checkpoint(path))
    except (CheckpointError, FileNotFoundError) as error:
        if "\n" in str(error) or path.name not in str(error):
            return f"the error is not one line with the file's name: {error}"
        found = None
    except Exception:
        return traceback.format_exc()
    if time.monotonic() - began > SECONDS:
        return "it took too long"
    if found is None or expected is None or names_differ(found, expected):
        return None
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    return f"{different[0]} was loaded with other values" if different else None


def names_differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether filling a model from `found` ends with an error that names what is missing, unexpected or misshapen."""
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (found, expected)]
    return shapes[0] != shapes[1]


def sweep(path: Path, damaged: Path, cases: Iterable[bytes], expected: dict[str, Tensor] | None) -> None:
    """Writes each of `cases` to `damaged` in turn and checks how `path` is handled, all in one child process."""

    def work(report: Callable[[tuple[int, str | None]], None]) -> None:
        limit = current_address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)
        for number, data in enumerate(cases):
            report((number, "died"))
            damaged.write_bytes(data)
            problem = check(path, expected)
            if problem:
                report((number, problem))
                return
        report((-1, None))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: work(sender.send))
    child.start()
    sender.close()
    last: tuple[int, str | None] = (0, "never began")
    while True:
        try:
            last = receiver.recv()
        except EOFError:
            break
    child.join()
    died = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit status {child.exitcode}"
    number, problem = last
    assert problem is None, f"case {number}: {problem} ({died})"
    assert child.exitcode == 0, died


def current_address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def truncations(data: bytes, boundaries: Iterable[int], generator) -> Iterable[bytes]:
    """The file cut at, before and after each boundary, and at 200 random places."""
    places = {place + shift for place in (0, 1, 7, 8, *boundaries) for shift in (-1, 0, 1)}
    places |= {generator.randrange(len(data)) for _ in range(200)}
    return (data[:place] for place in sorted(places) if 0 <= place < len(data))


def bit_flips(data: bytes, header: Iterable[int], count: int, generator) -> Iterable[bytes]:
    """`count` copies, each with one bit of its header changed."""
    places = list(header)
    for _ in range(count):
        changed = bytearray(data)
        changed[generator.choice(places)] ^= 1 << generator.randrange(8)
        yield bytes(changed)


def fuzzed(data: bytes, header: Iterable[int], count: int, generator) -> Iterable[bytes]:
    """`count` copies with a few changes to the header: other bytes, large numbers, pieces moved or cut out."""
    whole = list(header)
    numbers = [
        0,
        1,
        2**7,
        2**8 - 1,
        2**15,
        2**16 - 1,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ]
    for _ in range(count):
        changed, places = bytearray(data), whole
        for _ in range(generator.choice((1, 1, 1, 2, 4))):
            place = generator.choice(places)
            kind = generator.randrange(6)
            if kind == 0:
                changed[place] = generator.randrange(256)
            elif kind == 1:
                width = generator.choice((1, 2, 4, 8))
                value = generator.choice(numbers) % 256**width
                changed[place : place + width] = value.to_bytes(width, "little")
            elif kind == 2:
                other = generator.choice(places)
                length = generator.randrange(1, 40)
                changed[place : place + length] = changed[other : other + length]
            elif kind == 3:
                del changed[place : place + generator.randrange(1, 16)]
            elif kind == 4:
                changed[place:place] = generator.randbytes(generator.randrange(1, 16))
            else:
                digits = str(generator.choice(numbers)).encode()
                changed[place : place + generator.randrange(1, 6)] = digits
            places = [place for place in places if place < len(changed)]
            if not places:
                break
        yield bytes(changed)
