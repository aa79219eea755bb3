"""safetensors files: https://github.com/huggingface/safetensors#format

Read without its library, which does not say which tensor of a damaged file is wrong, and written without it because it
wants all tensors in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, shown
from .json import parse_json
from .mapped import MappedFile
from .writing import Entry, Progress

MAX_HEADER_BYTES = 32 << 20  # the format allows 100 MB; real headers have far less than one
STORED_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The tensors of a file as views of the mapped file, and the check to run before touching them.

    Raises CheckpointError unless the tensors fill the file exactly, without overlaps or holes.
    """
    mapped = MappedFile(path)
    start, header = _header(mapped)
    spans = sorted(
        (_span(path, name, entry, mapped.size - start), name, entry)
        for name, entry in header.items()
        if name != "__metadata__"
    )
    end = 0
    for (first, last), name, _ in spans:
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name}: starts at byte {first} of the data and {what} (at {end})")
        end = last
    if start + end != mapped.size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {start + end}, but the file has {mapped.size}; truncated or damaged"
        )
    tensors = {
        name: mapped.tensor(name, start + first, STORED_TYPES[entry["dtype"]], tuple(entry["shape"]))
        for (first, _), name, entry in spans
    }
    return tensors, mapped.check


def _header(mapped: MappedFile) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the JSON header before it."""
    length = int.from_bytes(mapped.buffer[:8], "little")
    if mapped.size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, mapped.size - 8):
        raise CheckpointError(
            f"{mapped.path}: not a safetensors file, or truncated: its header would take {length} bytes of "
            f"{mapped.size}"
        )
    data = mapped.buffer[8 : 8 + length]
    if not data.startswith(b"{"):
        raise CheckpointError(f"{mapped.path}: not a safetensors file: its header is no JSON object")
    return 8 + length, parse_json(data, mapped.path, MAX_HEADER_BYTES)


def _span(path: Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    """Where a tensor's bytes lie within the data, once its dtype, shape and offsets agree with each other."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in STORED_TYPES:
        raise CheckpointError(f"{path}: {name}: dtype {shown(dtype)} is not supported; {', '.join(STORED_TYPES)} are")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise CheckpointError(f"{path}: {name}: its shape or data_offsets are no lists of sizes")
    nbytes = prod(shape) * STORED_TYPES[dtype].itemsize
    first, last = offsets
    if last - first != nbytes:
        raise CheckpointError(f"{path}: {name}: takes {last - first} bytes, but {shape} needs {nbytes}")
    if last > size:
        raise CheckpointError(
            f"{path}: {name}: ends at byte {last} of the data, but the file has {size}; truncated or damaged"
        )
    return first, last


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], progress: Progress) -> None:
    """Writes tensors one at a time; `metadata` is kept in the header.

    `{"format": "pt"}` says that PyTorch's names and row-major order are meant.
    """
    names = {dtype: name for name, dtype in STORED_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 64)  # so that the tensors of a mapped file are aligned
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for entry in entries:
            entry.write(file)
            progress(entry.nbytes)
