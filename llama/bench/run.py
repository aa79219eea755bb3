"""From what a person asked for to a contest, and what is measured as it comes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..quantization import FORMATS
from ..streams import tell
from .contest import Contest, Figure, Start
from .machine import Limits, measure_limits
from .shapes import MODEL_SHAPES, write_model
from .sides import STORED, TWINS, UNPACKED, Material, contenders
from .works import WORKS


@dataclass(frozen=True)
class Bench:
    """The command's arguments; None is what stands in its help. Raises ValueError for a name that there is not."""

    model: Path | None  # None: `shape`
    shape: str | None = None
    precisions: list[str] | None = None
    vs: str | None = None
    works: str | None = None
    rounds: int = 5
    threads: int | None = None
    device: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)  # more of `Llama.build`

    def __post_init__(self) -> None:
        known = {"--shape": MODEL_SHAPES, "--precision": [STORED, UNPACKED, *FORMATS], "--works": WORKS}
        given = {"--shape": [self.shape] if self.shape else [], "--precision": self.wanted_precisions}
        given["--works"] = self.wanted_works
        for option, names in given.items():
            if unknown := [name for name in names if name not in known[option]]:
                raise ValueError(f"{option} is {unknown[0]!r}: there are {', '.join(known[option])}")
        peers = [one.name for one in contenders(self.vs) if one.side.reads == "gguf"]
        alone = [name for name in self.wanted_precisions if name in FORMATS and name not in TWINS]
        if peers and alone:
            raise ValueError(f"--vs {peers[0]} has nothing like --precision {alone[0]}")

    @property
    def wanted_precisions(self) -> list[str]:
        return self.precisions or ["sym_int4" if self.shape else STORED]

    @property
    def wanted_works(self) -> list[str]:
        return self.works.split(",") if self.works else list(WORKS)

    @property
    def title(self) -> str:
        return self.shape or self.model.name


def run_bench(bench: Bench) -> Iterator[Bench | Limits | Figure | Start]:
    """The bench itself, the machine's limits, then every figure when it is known.

    A model of random weights, and the forms that peers read, lie in a temporary folder meanwhile.
    """
    yield bench
    limits = measure_limits(bench.device, bench.threads)
    yield limits
    with tempfile.TemporaryDirectory(prefix="llama-bench-") as name:
        folder = Path(name)
        model = bench.model or folder / bench.shape
        if bench.shape:
            write_model(model, MODEL_SHAPES[bench.shape])
        contest = Contest(
            Material(model, folder, limits.dtype, limits.threads),
            contenders(bench.vs),
            bench.wanted_precisions,
            bench.wanted_works,
            limits,
            bench.rounds,
            bench.options,
        )
        for line in contest.left_out():
            tell(line)
        yield from contest.run()
