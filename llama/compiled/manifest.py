"""The manifest beside a package: what it was made with, and for an exported model its limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llama.files.errors import CheckpointError, shown
from llama.files.json import json_bytes, read_json

from .fingerprint import Fingerprint, short_digest

MANIFEST = "llama_export.json"
PACKAGE = "step.pt2"
FORMAT = 1


@dataclass(frozen=True)
class ExportLimits:
    """What a model was exported for: sequences at once, tokens of each, in which types, on how many threads."""

    batch_size: int
    sequence_length: int
    num_cores: int
    dtype: str  # as `Llama.build` takes it
    kv_dtype: str

    @classmethod
    def from_json(cls, values: Any, path: Path) -> ExportLimits:
        """Raises CheckpointError, which names `path`, for what is none."""
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: limits is {shown(values)}, and should be an object")
        for field in fields(cls):
            value = values.get(field.name)
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (isinstance(value, str) if field.type == "str" else is_number):
                raise CheckpointError(f"{path}: {field.name} is {shown(value)}, and should be a {field.type}")
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Manifest:
    made_with: Fingerprint
    package: str  # a digest of the package's file
    limits: ExportLimits | None = None  # of an exported model
    checkpoint: str | None = None  # and `Checkpoint.digest` of what lies beside

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a folder. Raises FileNotFoundError, or CheckpointError for a damaged one."""
        path = folder / MANIFEST
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{path}: has format {shown(values.get('format'))}; this version reads {FORMAT}")
        for name in ("package", "checkpoint"):
            if not isinstance(values.get(name, ""), str):
                raise CheckpointError(f"{path}: {name} is {shown(values[name])}, and should be a text")
        limits = values.get("limits")
        return cls(
            Fingerprint.from_json(values.get("made_with"), path),
            values.get("package", ""),
            None if limits is None else ExportLimits.from_json(limits, path),
            values.get("checkpoint"),
        )

    def write(self, folder: Path) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        (folder / MANIFEST).write_bytes(json_bytes({"format": FORMAT} | given))

    def is_of(self, folder: Path) -> bool:
        """Whether the package in the folder is the one that the manifest was written for."""
        file = folder / PACKAGE
        return file.is_file() and short_digest(file.read_bytes()) == self.package
