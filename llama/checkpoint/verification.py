"""Whether a checkpoint is whole: sums, index, names and shapes, finite values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from ..files.errors import CheckpointError, Finding
from .adapters import is_adapter
from .adapters.verification import verify_adapter
from .formats import recognise
from .hub import resolve
from .inventory import expected_shapes
from .opened import Checkpoint
from .weight import Weight

CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
_LINE = re.compile(r"([0-9a-f]{32})[ *]+([\w.-]+)")


def verify(path: str | Path) -> Iterator[Finding]:
    """Checks everything that can be checked, the quick things first; every weight is read once.

    A checkpoint that cannot be opened gives a finding too. Raises FileNotFoundError where nothing is at `path`.
    """
    path = resolve(path)
    if is_adapter(path):
        yield from verify_adapter(path)
        return
    if path.is_dir():
        yield from _checklists(path)
    try:
        row = recognise(path)
        checkpoint = row.open(path)
    except CheckpointError as error:
        yield Finding(False, path.name, str(error))
        return
    yield Finding(True, path.name, f"{checkpoint.format} checkpoint, headers are sound")
    yield from row.verify(path)
    yield from _shapes(checkpoint)
    yield from _values(checkpoint)


def _checklists(folder: Path) -> Iterator[Finding]:
    for directory in (folder, folder.absolute().parent):
        for name in CHECKLISTS:
            if (directory / name).is_file():
                yield from _sums(directory / name)


def _sums(checklist: Path) -> Iterator[Finding]:
    """The md5 sums of a checklist in `md5sum`'s format."""
    lines = checklist.read_text(errors="replace").splitlines()
    entries = [_LINE.fullmatch(line.strip()) for line in lines if line.strip()]
    if not entries or None in entries:
        yield Finding(False, checklist.name, "no list of md5 sums; was a web page saved in its place?")
        return
    for entry in entries:
        file = checklist.parent / entry[2]
        if not file.is_file():
            yield Finding(False, entry[2], f"is listed in {checklist.name}, but missing")
            continue
        with open(file, "rb") as data:
            found = hashlib.file_digest(data, "md5").hexdigest()
        yield Finding(found == entry[1], entry[2], f"md5 {found}, expected {entry[1]}")


def _shapes(checkpoint: Checkpoint) -> Iterator[Finding]:
    expected = dict(expected_shapes(checkpoint.args))
    weights = {weight.name: weight for weight in checkpoint.weights()}
    problems = [Finding(False, name, "is missing") for name in expected if name not in weights]
    for name, weight in weights.items():
        if name not in expected:
            problems.append(Finding(False, name, "is unexpected"))
        elif weight.shape != expected[name]:
            problems.append(Finding(False, name, f"has shape {list(weight.shape)}, expected {list(expected[name])}"))
    yield from problems
    if not problems:
        yield Finding(True, checkpoint.path.name, f"{len(weights)} weights have the names and shapes of the config")


def _values(checkpoint: Checkpoint) -> Iterator[Finding]:
    bad = [finding for weight in checkpoint.weights() if (finding := _value_problem(weight))]
    yield from bad
    if not bad:
        yield Finding(True, checkpoint.path.name, "every value is finite")


def _value_problem(weight: Weight) -> Finding | None:
    try:
        tensor = weight.read()
    except CheckpointError as error:
        return Finding(False, weight.name, str(error))
    wrong = tensor.numel() - int(tensor.isfinite().sum()) if tensor.is_floating_point() else 0
    return Finding(False, weight.name, f"{wrong} of {tensor.numel()} values are not finite") if wrong else None
