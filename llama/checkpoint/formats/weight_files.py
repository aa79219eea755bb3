"""Which files hold a Hugging Face directory's weights: there may be several sets, and indexes of absent ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ...files.errors import CheckpointError, Finding, shown
from ...files.json import read_json

CANDIDATES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OTHERS = ("consolidated", "adapter")  # how files begin that are no part of the model


@dataclass(frozen=True)
class WeightFiles:
    """The files that are read; the index that lists their tensors, if one does; and why others are not read."""

    files: list[Path]
    index: Path | None = None
    listed: dict[str, str] = field(default_factory=dict)
    """By the index: tensor name to file name."""
    passed_over: tuple[str, ...] = ()


def is_there(path: Path) -> bool:
    """Whether a directory holds anything that `find_weight_files` may take."""
    return any((path / name).is_file() for name in CANDIDATES) or bool(_unlisted(path))


def find_weight_files(path: Path) -> WeightFiles:
    """The first of CANDIDATES that is there with all its files; without any, all safetensors files.

    Raises CheckpointError where there is nothing, and where all there is are indexes of files that are missing.
    """
    present = [path / name for name in CANDIDATES if (path / name).is_file()]
    incomplete: dict[Path, str] = {}
    for candidate in present:
        index = candidate if candidate.suffix == ".json" else None
        listed = weight_map(index) if index else {"": candidate.name}
        absent = next((tensor for tensor, file in listed.items() if not (path / file).is_file()), None)
        if absent is not None:
            incomplete[candidate] = f"{absent}: its file {listed[absent]} is missing"
            continue
        files = [path / file for file in dict.fromkeys(listed.values())]
        why = {other: incomplete.get(other, f"{candidate.name} is read") for other in present if other != candidate}
        passed_over = tuple(f"{other}: is passed over: {reason}" for other, reason in why.items())
        return WeightFiles(files, index, listed if index else {}, passed_over)
    for index, problem in incomplete.items():
        raise CheckpointError(f"{index}: {problem}")
    unlisted = _unlisted(path)
    if not unlisted:
        raise CheckpointError(f"{path}: config.json is there, but neither model.safetensors nor pytorch_model.bin is")
    return WeightFiles(unlisted)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name from an index; a name that would leave the directory is refused."""
    entries: Any = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for tensor, file in entries.items():
        if not isinstance(file, str) or PurePath(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(f"{index}: {tensor}: {shown(file)} is no plain file name")
    return entries


def verify_index(path: Path) -> Iterator[Finding]:
    """What is passed over, and weight files that an index leaves out."""
    found = find_weight_files(path)
    yield from (Finding(True, path.name, reason) for reason in found.passed_over)
    if found.index is None:
        return
    stray = sorted(
        file.name
        for file in path.glob(f"*{found.files[0].suffix}")
        if file not in found.files and not file.name.startswith(OTHERS)
    )
    message = f"lists every tensor of {len(found.files)} files"
    if stray:
        message += f", but not {', '.join(stray)}"
    yield Finding(not stray, found.index.name, message)


def _unlisted(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*.safetensors") if not file.name.startswith(OTHERS))
