"""GGUF headers that no program writes."""

import struct

import pytest

from llama.files.errors import CheckpointError
from llama.files.gguf import GGUFFile


def gguf_file(path, *parts, version=3, tensors=0, pairs=0, magic=b"GGUF"):
    path.write_bytes(magic + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts))
    return path


def text(value, length=None):
    return struct.pack("<Q", len(value) if length is None else length) + value


def header(name=b"x", dims=(32,), kind=0, offset=0, num_dims=None):
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


FILL = bytes(64)


@pytest.mark.parametrize(
    ("parts", "counts", "message"),
    [
        ([FILL], {"magic": b"GGJT"}, "not a GGUF file"),
        ([FILL], {"version": 1}, "GGUF version 1 is not supported: versions 2 and 3 are read"),
        ([FILL], {"version": 3 << 24}, "it is big-endian"),
        ([FILL], {"pairs": 2**62}, "4611686018427387904 metadata entries are announced"),
        ([FILL], {"tensors": 2**62}, "4611686018427387904 tensors are announced"),
        ([text(b"k", 2**63), FILL], {"pairs": 1}, "9223372036854775808 bytes are announced"),
        ([text(b"k"), struct.pack("<I", 99), FILL], {"pairs": 1}, "the metadata type 99 is not known"),
        ([text(b"\xff"), FILL], {"pairs": 1}, "a string that is not UTF-8"),
        (
            [text(b"k"), struct.pack("<IIQ", 9, 4, 2**61), FILL],
            {"pairs": 1},
            "2305843009213693952 array values",
        ),
        ([text(b"k"), struct.pack("<IIQ", 9, 8, 2**61), FILL], {"pairs": 1}, "2305843009213693952 strings"),
        (
            [text(b"k"), struct.pack("<IIQ", 9, 9, 1), FILL],
            {"pairs": 1},
            "arrays of metadata type 9 are not supported",
        ),
        (
            [(text(b"k") + struct.pack("<IB", 0, 1)) * 2, FILL],
            {"pairs": 2},
            "the metadata key 'k' occurs twice",
        ),
        ([header(num_dims=0), FILL], {"tensors": 1}, "x: 0 dimensions; 1 to 4 are allowed"),
        ([header(num_dims=2**31), FILL], {"tensors": 1}, "x: 2147483648 dimensions"),
        ([header(kind=4), FILL], {"tensors": 1}, "x: the ggml type 4 is not known"),
        ([header(kind=2**32 - 1), FILL], {"tensors": 1}, "x: the ggml type 4294967295 is not known"),
        ([header(dims=(0,)), FILL], {"tensors": 1}, r"x: has shape \[0\]"),
        ([header(dims=(2**40, 2**40)), FILL], {"tensors": 1}, "x: ends at byte"),
        ([header(dims=(2**63, 2)), FILL], {"tensors": 1}, "x: ends at byte"),
        ([header(dims=(33,), kind=2), FILL], {"tensors": 1}, "x: rows of 33 are not whole Q4_0 blocks of 32"),
        ([header(offset=2**63), FILL], {"tensors": 1}, "x: is at byte 9223372036854775808, expected 0"),
        ([header(offset=7), FILL], {"tensors": 1}, "x: is at byte 7, expected 0"),
        ([header(), header(), bytes(400)], {"tensors": 2}, "x: occurs twice"),
        ([header(), bytes(900)], {"tensors": 1}, "the tensors end at byte 192, but the file has"),
    ],
)
def test_hand_made_gguf_headers_are_refused(tmp_path, parts, counts, message):
    with pytest.raises(CheckpointError, match=message) as error:
        GGUFFile(gguf_file(tmp_path / "x.gguf", *parts, **counts))
    assert "x.gguf" in str(error.value)
