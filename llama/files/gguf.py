"""The GGUF container (versions 2 and 3): metadata and tensor headers, every count and offset checked first.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .mapped import MappedFile
from .writing import Entry, Progress

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT8, INT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 0, 1, 4, 5, 6, 7, 8, 9
MAX_DIMS = 4

BLOCKS: dict[int, tuple[str, int, int]] = {
    # ggml's number: (name, weights per block, bytes per block)
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of the file: `shape` in PyTorch's order (the file's is the other way round), `offset` in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def nbytes(self) -> int:
        _, block, size = BLOCKS[self.kind]
        return prod(self.shape) // block * size


@dataclass(frozen=True)
class LazyArray:
    """A metadata array that stays in the file until it is asked for: bytes `start` to `end`, known to be good."""

    file: GGUFFile
    kind: int
    length: int
    start: int
    end: int
    ends: Sequence[int] = ()
    """Where each string ends; an array of numbers has none."""

    def read(self) -> list[Any]:
        """Its values as a Python list."""
        self.file.mapped.check()
        data = self.file.mapped.buffer
        if self.kind != STRING:
            return list(struct.unpack(f"<{self.length}{SCALARS[self.kind]}", data[self.start : self.end]))
        try:
            return [data[end + 8 : next].decode() for end, next in pairwise(chain((self.start,), self.ends))]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file.path}: a string that is not UTF-8: {error.reason}") from error


class GGUFFile:
    """An opened GGUF file: `metadata` (arrays stay lazy), `tensors` by name, and the mapped bytes."""

    def __init__(self, path: Path) -> None:
        self.mapped = MappedFile(path)
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorHeader] = {}
        cursor = _Cursor(self, 0)
        if bytes(self.mapped.buffer[:4]) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file")
        cursor.offset = 4
        version = cursor.scalar("I")
        if version not in (2, 3):
            big_endian = int.from_bytes(struct.pack("<I", version), "big") in (2, 3)
            why = "it is big-endian" if big_endian else "versions 2 and 3 are read"
            raise CheckpointError(f"{path}: GGUF version {version} is not supported: {why}")
        num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
        self._read_metadata(cursor, num_pairs)
        self._read_tensors(cursor, num_tensors)

    def scalars(self) -> dict[str, Any]:
        """The metadata without its arrays."""
        return {key: value for key, value in self.metadata.items() if not isinstance(value, LazyArray)}

    def length(self, key: str) -> int:
        """How many values the array `key` holds; 0 where it is absent."""
        value = self.metadata.get(key)
        return value.length if isinstance(value, LazyArray) else 0

    def _read_metadata(self, cursor: _Cursor, count: int) -> None:
        cursor.expect(count, 13, "metadata entries")  # an empty key, its type, a value of one byte
        for _ in range(count):
            key = cursor.string()
            kind = cursor.scalar("I")
            if key in self.metadata:
                raise cursor.error(f"the metadata key {key!r} occurs twice")
            self.metadata[key] = cursor.array() if kind == ARRAY else cursor.value(kind)

    def _read_tensors(self, cursor: _Cursor, count: int) -> None:
        cursor.expect(count, 32, "tensors")  # an empty name, one dimension, type and offset
        found = [self._tensor_header(cursor) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment is {alignment!r}, which is no power of two")
        start = _padded(cursor.offset, alignment)
        end = 0
        for header in found:
            if header.name in self.tensors:
                raise CheckpointError(f"{self.path}: {header.name}: occurs twice")
            if header.offset != end:
                raise CheckpointError(f"{self.path}: {header.name}: is at byte {header.offset}, expected {end}")
            end = _padded(header.offset + header.nbytes, alignment)
            if start + header.offset + header.nbytes > self.mapped.size:
                raise CheckpointError(
                    f"{self.path}: {header.name}: ends at byte {start + header.offset + header.nbytes}, but the file "
                    f"has {self.mapped.size}; it is truncated or damaged"
                )
            self.tensors[header.name] = replace(header, offset=start + header.offset)
        if found and start + end < self.mapped.size:
            raise CheckpointError(
                f"{self.path}: the tensors end at byte {start + end}, but the file has {self.mapped.size}"
            )

    def _tensor_header(self, cursor: _Cursor) -> TensorHeader:
        name = cursor.string()
        num_dims = cursor.scalar("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise cursor.error(f"{name}: {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
        shape = tuple(cursor.scalar("Q") for _ in range(num_dims))[::-1]
        kind = cursor.scalar("I")
        offset = cursor.scalar("Q")
        if kind not in BLOCKS:
            raise cursor.error(f"{name}: the ggml type {kind} is not known")
        stored, block, _ = BLOCKS[kind]
        if 0 in shape:
            raise cursor.error(f"{name}: has shape {list(shape)}")
        if shape[-1] % block:
            raise cursor.error(f"{name}: rows of {shape[-1]} are not whole {stored} blocks of {block}")
        return TensorHeader(name, shape, kind, offset)


def shortest(value: float) -> float:
    """The shortest decimal number that float32 rounds to `value`: 1e-05, not 9.999999747378752e-06."""
    if value != value or value in (float("inf"), float("-inf")):
        return value
    return next(short for digits in range(6, 10) if as_float32(short := float(f"{value:.{digits}g}")) == value)


def as_float32(value: float) -> float:
    """`value` rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


class _Cursor:
    """Reads values one after the other; never beyond the end of the file."""

    def __init__(self, file: GGUFFile, offset: int) -> None:
        self.file = file
        self.offset = offset

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {problem} (at byte {self.offset})")

    def expect(self, count: int, least: int, what: str) -> None:
        """Raises if `count` things of `least` bytes or more cannot be in what is left."""
        left = self.file.mapped.size - self.offset
        if count * least > left:
            raise self.error(f"{count} {what} are announced, but only {left} bytes are left; truncated or damaged")

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes and gives the offset before."""
        self.expect(size, 1, "bytes")
        start = self.offset
        self.offset += size
        return start

    def scalar(self, code: str) -> Any:
        code = "<" + code
        (value,) = struct.unpack_from(code, self.file.mapped.buffer, self.skip(struct.calcsize(code)))
        return shortest(value) if code == "<f" else value

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        try:
            return self.file.mapped.buffer[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a string that is not UTF-8: {error.reason}") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind not in SCALARS:
            raise self.error(f"the metadata type {kind} is not known")
        return self.scalar(SCALARS[kind])

    def array(self) -> LazyArray:
        """Walks over an array, so that its bounds are known to be good, and keeps its place only."""
        kind = self.scalar("I")
        length = self.scalar("Q")
        start = self.offset
        if kind in SCALARS:
            size = struct.calcsize("<" + SCALARS[kind])
            self.expect(length, size, "array values")
            self.skip(length * size)
        elif kind == STRING:
            self.expect(length, 8, "strings")
            ends = string_ends(self.file.mapped.buffer, start, length)
            if len(ends) < length:
                raise self.error(f"{length} strings are announced, but the file ends inside them")
            self.offset = ends[-1] if ends else start
            return LazyArray(self.file, kind, length, start, self.offset, ends)
        else:
            raise self.error(f"arrays of metadata type {kind} are not supported")
        return LazyArray(self.file, kind, length, start, self.offset)


TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""ggml's numbers of the types that are written."""
ALIGNMENT = 32


@dataclass(frozen=True)
class Value:
    """A metadata value to be written as the GGUF type `kind`; a list becomes an array of that type."""

    kind: int
    value: Any

    def encode(self) -> bytes:
        if not isinstance(self.value, list):
            return struct.pack("<I", self.kind) + self._scalar(self.value)
        values = b"".join(self._scalar(value) for value in self.value)
        return struct.pack("<IIQ", ARRAY, self.kind, len(self.value)) + values

    def _scalar(self, value: Any) -> bytes:
        return _string(value) if self.kind == STRING else struct.pack("<" + SCALARS[self.kind], value)


def string_ends(data: mmap, at: int, count: int) -> Sequence[int]:
    """Where each of `count` strings ends, the first at `at` and each behind the other; fewer where the data ends."""
    length_at = struct.Struct("<Q").unpack_from
    size = len(data)
    ends = array("Q")
    for _ in range(count):
        if at + 8 > size:
            break
        at += 8 + length_at(data, at)[0]
        if at > size:
            break
        ends.append(at)
    return ends


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def write_gguf(path: Path, entries: Sequence[Entry], metadata: Mapping[str, Value], progress: Progress) -> None:
    """Writes a version 3 file, one tensor at a time; `metadata` are its keys."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))]
    parts += [_string(key) + value.encode() for key, value in metadata.items()]
    offset = 0
    for entry in entries:
        dims = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        parts.append(_string(entry.name) + dims + struct.pack("<IQ", TYPE_NUMBERS[entry.dtype], offset))
        offset += _padded(entry.nbytes, ALIGNMENT)
    header = b"".join(parts)
    with open(path, "wb") as file:
        file.write(header + bytes(_padded(len(header), ALIGNMENT) - len(header)))
        for entry in entries:
            entry.write(file)
            file.write(bytes(_padded(entry.nbytes, ALIGNMENT) - entry.nbytes))
            progress(entry.nbytes)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
