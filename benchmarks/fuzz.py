"""Fuzzing for as long as one likes: files of every kind, bodies of every API, what models write of tools.

    python benchmarks/fuzz.py [--minutes 60] [--targets gguf,tokenizers] [--workers 2] [--seed 0]

`tests/support/fuzzing.py` has the targets and what must hold of each. They take turns, some seconds each, in processes
of their own, so that a crash of a compiled library is a finding and not the end: a finding is an exception that was not
promised, a process that dies, an input that takes more than 2 seconds, or one that asks for more than 256 MiB. The
input of each finding is kept as `tests/corpus/TARGET/DIGEST`, which the tests replay from then on. The last line is
JSON; exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from common.timing import report

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from support.fuzzing import TARGETS, Target  # noqa: E402
from support.hostile import current_address_space  # noqa: E402

SLICE, SECONDS, MEMORY = 15.0, 2, 256 << 20  # seconds of a turn, and of the processor for one input; bytes of memory
PATIENCE = 10  # times as long by the clock: others use the machine, too
FORK = multiprocessing.get_context("fork")  # the targets are made once


class TooSlow(Exception):
    """An input took too long."""


def slow(number: int, frame: object) -> None:
    raise TooSlow(f"an input took more than {SECONDS} seconds")


def work(target: Target, seed: int, current: Path, sender: Connection) -> None:
    """One turn, in a process of its own: tells how many inputs there were, and what was wrong with the last one."""
    limit = current_address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, slow)
    ends, count = time.monotonic() + SLICE, 0
    for data in target.inputs(random.Random(seed)):
        if time.monotonic() > ends:
            break
        current.write_bytes(data)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * SECONDS)
        try:
            target.check(data)
        except BaseException:
            sender.send((count, traceback.format_exc()))
            return
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        count += 1
    sender.send((count, None))


def turn(target: Target, seed: int, current: Path) -> tuple[int, str | None]:
    """How many inputs one turn had, and what was found; a process that is stuck in a library is killed."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=work, args=(target, seed, current, sender))
    child.start()
    sender.close()
    try:
        if receiver.poll(SLICE + 2 * PATIENCE * SECONDS):
            return receiver.recv()
        child.kill()
        return 0, "a compiled library does not come back"
    except EOFError:
        child.join()
        return 0, f"the process ended with status {child.exitcode}"
    finally:
        child.join()


def keep(name: str, data: bytes) -> Path:
    path = TESTS / "corpus" / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    findings: list[dict[str, str]] = []
    ends = time.monotonic() + 60 * options.minutes
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # where there is one, no disk is worn

    def run(worker: int) -> None:
        with tempfile.TemporaryDirectory(prefix="llama-fuzz-", dir=memory) as name:
            folder, seed = Path(name), options.seed + worker * 1_000_000
            targets = {name: TARGETS[name](folder / name) for name in options.targets.split(",")}
            while time.monotonic() < ends:
                for name, target in targets.items():
                    seed += 1
                    count, problem = turn(target, seed, folder / "current")
                    counts[name] += count
                    if problem is not None:
                        path = keep(name, (folder / "current").read_bytes())
                        findings.append({"target": name, "input": str(path), "problem": problem})
                        print(f"{name}: {problem.splitlines()[-1]} ({path})", flush=True)

    with ThreadPoolExecutor(options.workers) as workers:
        list(workers.map(run, range(options.workers)))
    for name, count in counts.items():
        print(f"{name:14} {count:10,} inputs, {sum(one['target'] == name for one in findings)} findings")
    print(f"{'together':14} {sum(counts.values()):10,} inputs, {len(findings)} findings")
    report({"minutes": options.minutes, "inputs": counts, "findings": findings})
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
