"""Sides that do the same work in turns, beside the machine's limits, which take their turn too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from ..checkpoint import open_checkpoint
from .machine import Limits, matrix_rate, num_threads, read_bandwidth
from .peer import Peer
from .sides import OURS, STORED, TWINS, Contender, Material
from .timing import alternate
from .works import WORKS, Effort, Work

NUM_STARTS = 3  # how often each side is started

Times = tuple[float, float, float]  # seconds: imports, loading, until the first token in all


@dataclass(frozen=True)
class Figure:
    """What one side reached in one work."""

    precision: str
    work: str
    side: str
    seconds: float  # median of the rounds: of a prompt, or of a step
    tokens_per_s: float
    spread: tuple[float, float]  # tokens per second in the slowest and in the fastest round
    setting: str
    ratio: float | None  # how many times as fast as this side we are; None: it is ours
    limit: str  # what bounds the work here: "read bandwidth" or "matrix rate"
    share_of_limit: float  # 1: nothing could be faster


@dataclass(frozen=True)
class Start:
    """What a side takes to start, medians of some starts with files that the system has cached."""

    precision: str
    side: str
    import_seconds: float  # its libraries
    load_seconds: float
    first_token_seconds: float  # from the start of the process, all of it
    peak_bytes: int | None  # resident after all works, files that are mapped included; None: the system does not tell


@dataclass
class Contest:
    """One model on one machine; `figures` yields what is measured as it comes."""

    material: Material
    contenders: list[Contender]
    precisions: list[str]
    works: list[str]
    limits: Limits
    rounds: int = 5
    options: dict[str, Any] = field(default_factory=dict)  # of `Llama.build`, for our side

    def __post_init__(self) -> None:
        self.device = torch.device(self.limits.device)
        checkpoint = open_checkpoint(self.material.model)
        self.is_packed = checkpoint.dtype is None  # as it is stored
        self.context = checkpoint.args.max_seq_len

    def left_out(self) -> Iterator[str]:
        """What was asked for and cannot be measured, one line each."""
        for name in self.works:
            if WORKS[name].length > self.context:
                yield f"{name}: the model was made for {self.context} tokens"
        for precision in self.precisions:
            for one in self.contenders:
                if not self._knows(one, precision):
                    yield f"{one.name} has no low bits: it takes no part in {precision}; --precision none compares all"

    def run(self) -> Iterator[Figure | Start]:
        """Raises RuntimeError, in one line, where a side cannot do its part."""
        works = [name for name in self.works if WORKS[name].length <= self.context]
        for precision in self.precisions:
            with ExitStack() as processes:
                running, starts = self._started(precision, processes)
                for work in works:
                    yield from self._figures(precision, work, running)
                for name, one in running.items():
                    times = map(median, zip(*starts[name], strict=True))
                    yield Start(precision, name, *times, one.peer.ask(do="memory")["bytes"])

    def _started(self, precision: str, processes: ExitStack) -> tuple[dict[str, Running], dict[str, list[Times]]]:
        """Every side that takes part, by its name, and how long each of its starts took; they end with `processes`."""
        taking_part = [one for one in self.contenders if self._knows(one, precision)]
        running: dict[str, Running] = {}
        starts: dict[str, list[Times]] = {one.name: [] for one in taking_part}
        for _ in range(NUM_STARTS):
            for one in taking_part:
                if one.name in running:
                    running[one.name].peer.close()
                running[one.name], times = self._start(one, precision, processes)
                starts[one.name].append(times)
        return running, starts

    def _knows(self, contender: Contender, precision: str) -> bool:
        return contender.side.packs or not (precision in TWINS or (precision == STORED and self.is_packed))

    def _start(self, contender: Contender, precision: str, processes: ExitStack) -> tuple[Running, Times]:
        works = [WORKS[name] for name in self.works]
        request = self.material.load_request(contender, precision) | {
            "threads": self.material.threads,
            "max_seq_len": min(self.context, max(work.length for work in works)),
            "max_batch_size": max(work.num_prompts for work in works),
            "device": self.limits.device,
        }
        request |= self.options if contender.name == OURS else {}
        began = time.perf_counter()
        peer = contender.side.start(contender.python)
        processes.callback(peer.close)
        peer.ask(do="memory")  # answered when all is imported
        imported = time.perf_counter()
        facts = peer.ask(do="load", **request)
        loaded = time.perf_counter()
        running = Running(contender, peer, facts)
        running.seconds(Work(1, 8, 1), contender.side.settings[0])
        return running, (imported - began, loaded - imported, time.perf_counter() - began)

    def _figures(self, precision: str, name: str, running: dict[str, Running]) -> Iterator[Figure]:
        work = WORKS[name]
        best = {side: one.best_setting(work) for side, one in running.items()}
        sides: dict[str, Callable[[], float]] = {
            side: partial(one.seconds, work, best[side]) for side, one in running.items()
        }
        with num_threads(self.material.threads):
            found = alternate(
                self.rounds,
                **sides,
                **{"read bandwidth": partial(read_bandwidth, 3, self.device)},
                **{"matrix rate": partial(matrix_rate, getattr(torch, self.limits.dtype), 3, self.device)},
            )
        effort = Effort(**{key: running[OURS].facts[key] for key in Effort.__dataclass_fields__})
        least = {
            "read bandwidth": effort.bytes_read(work) / median(found["read bandwidth"]),
            "matrix rate": effort.operations(work) / median(found["matrix rate"]),
        }
        limit = max(least, key=least.get)
        for side in running:
            seconds = median(found[side])
            yield Figure(
                precision,
                name,
                side,
                seconds,
                work.tokens / seconds,
                (work.tokens / max(found[side]), work.tokens / min(found[side])),
                ", ".join(f"{key} {value}" for key, value in best[side].items()),
                None if side == OURS else seconds / median(found[OURS]),
                limit,
                least[limit] / seconds,
            )


@dataclass
class Running:
    """A side whose process has loaded the model."""

    contender: Contender
    peer: Peer
    facts: dict[str, Any]

    def seconds(self, work: Work, setting: dict[str, Any]) -> float:
        """Up to the first token, or of the median step after it."""
        prompts = work.prompts(self.facts["vocab_size"])
        answer = self.peer.ask(do="run", prompts=prompts, num_tokens=work.num_tokens, **setting)
        counts = {len(tokens) for tokens in answer["tokens"]}
        if counts != {work.num_tokens}:
            raise RuntimeError(f"{self.contender.name} gave {counts} tokens instead of {work.num_tokens}")
        return answer["first_seconds"] if work.is_prompt else median(answer["step_seconds"])

    def best_setting(self, work: Work) -> dict[str, Any]:
        """Of what the side can be told, the fastest when each is tried once."""
        settings = self.contender.side.settings
        if len(settings) == 1:
            return dict(settings[0])
        return dict(min(settings, key=partial(self.seconds, work)))
