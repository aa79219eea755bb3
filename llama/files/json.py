"""JSON that nobody vouches for: one object, of bounded size, no key twice, no NaN, no bottomless nesting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .mapped import open_file

MAX_JSON_BYTES = 16 << 20


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most `limit` bytes. Raises CheckpointError, FileNotFoundError."""
    with open_file(path) as file:
        data = file.read(limit + 1)
    return parse_json(data, path, limit)


def parse_json(data: bytes, path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`data` as a JSON object of at most `limit` bytes; `path` is named in errors."""
    if len(data) > limit:
        raise CheckpointError(f"{path}: more than {limit >> 20} MB of JSON")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also JSONDecodeError, UnicodeDecodeError
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def json_bytes(value: dict[str, Any]) -> bytes:
    """A JSON file's content, keys in the order given. Half a surrogate pair, which UTF-8 lacks, stays an escape."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
