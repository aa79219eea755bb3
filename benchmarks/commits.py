"""Two checkouts of this project side by side: is any work slower, or faster, than it was?

    python benchmarks/commits.py ../before .                            # all works, about five minutes
    python benchmarks/commits.py ../before . --works decode,batch --models sym_int4 --processes 1
    python benchmarks/commits.py ../before . --threads 1                # where other programs compute too

The default model, unpacked ("none") and in sym_int4. Each checkout runs in a process of its own with this
interpreter's libraries; `--processes` fresh pairs of them take turns work by work, `--rounds` times each. The works:

    prefill        a prompt of 512 tokens
    prompt16 ...   a prompt of 16, 32, 64 or 128 tokens
    rows2 ...      2, 4 or 8 rows of one request behind 512 tokens that are in the cache
    decode         a step of one stream behind 512 tokens
    batch          a step of 32 streams behind 32 tokens

Figures are medians, of the wall clock and of the processor (all threads of the process together); a ratio is the second
checkout's over the first's, below 1 where the second is faster, the median of the rounds' own ratios. Compiled kernels
are those that each checkout holds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from common.peers import CHECKOUT, Peer
from common.timing import median, report

VOCABULARY = range(100, 49000)


@dataclass(frozen=True)
class Work:
    """`num_tokens` after each prompt; the median of all steps but the first `skip`, or all together (None)."""

    num_prompts: int
    prompt_tokens: int
    num_tokens: int
    skip: int | None
    new_rows: int = 0  # behind a prompt that was computed before; 0: all of it is new


WORKS = {
    "prefill": Work(1, 512, 1, None),
    **{f"prompt{rows}": Work(1, rows, 1, None) for rows in (16, 32, 64, 128)},
    **{f"rows{rows}": Work(1, 512, 1, None, rows) for rows in (2, 4, 8)},
    "decode": Work(1, 512, 25, 1),
    "batch": Work(32, 32, 17, 2),
}
REPEATS = {"prompt": 5, "rows": 5}  # of the short ones, within a turn
MODELS = ("none", "sym_int4")
SIDES = ("before", "after")


def ask(side: Peer, model: str, name: str, seed: int) -> tuple[dict[str, float], list[list[int]]]:
    """Seconds of one turn by clock, and the tokens of the answers; both sides get the same prompts."""
    work, rng = WORKS[name], random.Random(seed)
    found, tokens = [], []
    for _ in range(REPEATS.get(name.rstrip("0123456789"), 1)):
        prompts = [rng.choices(VOCABULARY, k=work.prompt_tokens) for _ in range(work.num_prompts)]
        if work.new_rows:
            side.ask(model=model, prompts=prompts, num_tokens=1, skip=None)
            prompts = [prompt + rng.choices(VOCABULARY, k=work.new_rows) for prompt in prompts]
        answer = side.ask(model=model, prompts=prompts, num_tokens=work.num_tokens, skip=work.skip)
        found.append(answer)
        tokens += answer["tokens"]
    return {clock: median([one[clock] for one in found]) for clock in ("wall", "cpu")}, tokens


@contextmanager
def children(paths: list[Path], models: list[str], threads: int) -> Iterator[dict[str, Peer]]:
    """A fresh process for each checkout, its models built."""
    environment = {"OMP_NUM_THREADS": str(threads)}
    peers = {
        side: Peer(sys.executable, CHECKOUT, **environment, PYTHONPATH=str(path))
        for side, path in zip(SIDES, paths, strict=True)
    }
    for path, peer in zip(paths, peers.values(), strict=True):
        for model in models:
            package = Path(peer.ask(build=model, threads=threads)["package"])
            if not package.is_relative_to(path):
                raise RuntimeError(f"{path} holds no package `llama`: {package} was imported")
    yield peers
    for peer in peers.values():
        peer.close()


@dataclass(frozen=True)
class Result:
    """One work of one model. Seconds and ratios are medians."""

    model: str
    work: str
    wall: dict[str, float]
    cpu: dict[str, float]
    wall_ratio: float
    cpu_ratio: float
    same_tokens: float  # share of the answers that are equal on both sides

    def show(self) -> None:
        walls, cpus = (" -> ".join(f"{1e3 * s:8.2f}" for s in c.values()) for c in (self.wall, self.cpu))
        print(
            f"{self.model:9}{self.work:10} wall {walls} ms  {self.wall_ratio:5.3f}   cpu {cpus} ms  "
            f"{self.cpu_ratio:5.3f}   same answers {self.same_tokens:.0%}",
            flush=True,
        )


def summarize(model: str, work: str, turns: list[dict[str, tuple[dict[str, float], list]]]) -> Result:
    seconds = {clock: {side: [turn[side][0][clock] for turn in turns] for side in SIDES} for clock in ("wall", "cpu")}
    ratios = {
        clock: median([after / before for before, after in zip(*found.values(), strict=True)])
        for clock, found in seconds.items()
    }
    pairs = [pair for turn in turns for pair in zip(*(turn[side][1] for side in SIDES), strict=True)]
    return Result(
        model,
        work,
        *({side: median(found) for side, found in seconds[clock].items()} for clock in ("wall", "cpu")),
        round(ratios["wall"], 4),
        round(ratios["cpu"], 4),
        sum(ours == theirs for ours, theirs in pairs) / len(pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of this project")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--models", default=",".join(MODELS), help="what Llama.build takes as quantization")
    parser.add_argument("--processes", type=int, default=3, help="fresh pairs of processes")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each work in each pair")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    works, models = options.works.split(","), options.models.split(",")
    if unknown := [work for work in works if work not in WORKS]:
        parser.error(f"unknown works {', '.join(unknown)}; choose from {', '.join(WORKS)}")
    paths = [options.before.resolve(), options.after.resolve()]
    turns: dict[tuple[str, str], list[dict]] = {(model, work): [] for model in models for work in works}
    for pair in range(options.processes):
        with children(paths, models, options.threads) as peers:
            for model, work in turns:
                for number in range(-1, options.rounds):  # the first is a warm-up
                    seed = 1000 * pair + number
                    order = SIDES if number % 2 else SIDES[::-1]
                    turn = {side: ask(peers[side], model, work, seed) for side in order}
                    if number >= 0:
                        turns[model, work].append(turn)
        print(f"pair {pair + 1} of {options.processes} has run", file=sys.stderr, flush=True)
    results = [summarize(model, work, found) for (model, work), found in turns.items()]
    for result in results:
        result.show()
    report({"threads": options.threads, "paths": list(map(str, paths)), "results": [vars(r) for r in results]})


if __name__ == "__main__":
    main()
