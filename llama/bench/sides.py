"""Who is measured: this engine and its peers, each in a process of its own with the files that it reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import convert, open_checkpoint, save_low_bit
from .peer import Peer

CHILDREN = Path(__file__).parent / "children"
PACKAGE_ROOT = Path(__file__).parents[2]
UNPACKED, STORED = "none", "stored"  # precisions beside the low-bit formats

TWINS = {  # the type of llama.cpp's that has as many bits as a format of ours
    "sym_int4": "q4_0", "asym_int4": "q4_1", "sym_int5": "q5_0", "asym_int5": "q5_1", "sym_int8": "q8_0",
    "nf4": "q4_0", "q4_0": "q4_0", "q4_1": "q4_1", "q5_0": "q5_0", "q5_1": "q5_1", "q8_0": "q8_0",
    "q4_k": "q4_k", "q6_k": "q6_k", "zero_int4": "q4_1",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """A row of SIDES."""

    script: str  # in `children/`
    reads: str | None  # the format of checkpoint; None: any
    needs: str  # what to install where it is missing
    packs: bool = True  # whether it knows low bits
    settings: tuple[Mapping[str, Any], ...] = ({},)
    """What it can be told for a run, of which the fastest counts."""

    def start(self, python: str) -> Peer:
        return Peer(python, CHILDREN / self.script, PYTHONPATH=str(PACKAGE_ROOT))


FLASH = ({"flash": True}, {"flash": False})
OURS = "llama"
SIDES = {
    OURS: Side("ours.py", None, "llama-native"),
    "llamacpp": Side("llamacpp.py", "gguf", "llama-cpp-python", settings=FLASH),
    "ik": Side("llamacpp.py", "gguf", "ik-llama-cpp-python", settings=FLASH),
    "transformers": Side("huggingface.py", "hf", "transformers", packs=False),
    "padded": Side("padded.py", "meta", "llama-native", packs=False),
}
"""Whom `--vs` knows. "padded" is the manner of Meta's reference code: one padded batch."""


@dataclass(frozen=True)
class Contender:
    """A side, and the interpreter that runs it."""

    name: str
    python: str = sys.executable

    @property
    def side(self) -> Side:
        return SIDES[self.name]


def contenders(vs: str | None) -> list[Contender]:
    """This engine, and "llamacpp=/path/to/python,transformers": names of SIDES, where needed with their interpreters.

    Raises ValueError for a name that there is not.
    """
    found = [Contender(OURS)]
    for given in filter(None, (vs or "").split(",")):
        name, _, python = given.partition("=")
        if name not in SIDES or name == OURS:
            raise ValueError(f"--vs names {name!r}: there are {', '.join(SIDES.keys() - {OURS})}")
        found.append(Contender(name, python or sys.executable))
    return found


@dataclass
class Material:
    """The model in every form that somebody reads, each made once, in `folder`."""

    model: Path
    folder: Path
    dtype: str  # what a model in 16 bits computes in on this machine: of every form that is not packed
    threads: int
    made: dict[str, Path] = field(default_factory=dict)

    def load_request(self, contender: Contender, precision: str) -> dict[str, Any]:
        """What a side is asked to load."""
        if contender.name == OURS:
            given = precision if precision == UNPACKED else None
            return {"path": str(self._ours(precision)), "precision": given}
        side = contender.side
        path = self._packed(contender, TWINS[precision]) if precision in TWINS else self._plain(side.reads, precision)
        return {"path": str(path), "dtype": self.dtype}

    def _ours(self, precision: str) -> Path:
        if precision in (UNPACKED, STORED):
            return self.model
        if precision not in self.made:
            self.made[precision] = self.folder / precision
            save_low_bit(open_checkpoint(self.model), self.made[precision], precision)
        return self.made[precision]

    def _plain(self, format: str, precision: str) -> Path:
        """The model in a type without blocks; llama.cpp also runs a GGUF file as it is stored."""
        if format == "gguf" and precision == STORED and self.model.suffix == ".gguf":
            return self.model
        if format not in self.made:
            self.made[format] = self.folder / ("model.gguf" if format == "gguf" else format)
            convert(self.model, self.made[format], to=format, dtype=self.dtype)
        return self.made[format]

    def _packed(self, contender: Contender, type: str) -> Path:
        """A GGUF file with every matrix in one type, which the peer packs itself."""
        name = f"{contender.name}-{type}"
        if name not in self.made:
            self.made[name] = self.folder / f"{name}.gguf"
            peer = contender.side.start(contender.python)
            source, target = str(self._plain("gguf", STORED)), str(self.made[name])
            peer.ask(do="pack", path=source, to=target, type=type, threads=self.threads)
            peer.close()
        return self.made[name]
