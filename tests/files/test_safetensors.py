"""safetensors files, against their own library."""

import json
import random
import struct

import pytest
import torch
from support.checkpoints import assert_equal
from support.hostile import bit_flips, fuzzed

from llama.files.errors import CheckpointError
from llama.files.safetensors import read_safetensors


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry(offsets=(0, 4))}, b"1234", r"x: takes 4 bytes, but \[2\] needs 8"),
        ({"x": entry(offsets=(8, 0))}, b"12345678", "x: takes -8 bytes"),
        ({"x": entry(offsets=(-8, 0))}, b"12345678", "x: its shape or data_offsets"),
        ({"x": entry(shape=(-2,))}, b"12345678", "x: its shape or data_offsets"),
        ({"x": entry(shape=(2.0,))}, b"12345678", "x: its shape or data_offsets"),
        ({"x": entry(shape=(True, 2))}, b"12345678", "x: its shape or data_offsets"),
        ({"x": entry(shape=(2**62, 2**62, 2**62))}, b"12345678", "x: takes 8 bytes"),
        ({"x": entry(shape=(2**64,))}, b"12345678", "x: its shape or data_offsets"),
        ({"x": entry(offsets=(0, 8, 9))}, b"12345678", "x: its shape or data_offsets"),
        ({"x": entry(dtype="F4", shape=(8,))}, b"12345678", "x: dtype 'F4' is not supported"),
        ({"x": entry(dtype=["F32"])}, b"12345678", "x: dtype"),
        ({"x": [1]}, b"12345678", "x: dtype"),
        (
            {"x": entry(), "y": entry(offsets=(4, 12))},
            b"1" * 12,
            "y: starts at byte 4 of the data and overlaps",
        ),
        (
            {"x": entry(), "y": entry(offsets=(12, 20))},
            b"1" * 20,
            "y: starts at byte 12 of the data and leaves a hole",
        ),
        ({"x": entry(offsets=(4, 12))}, b"1" * 12, "x: starts at byte 4 of the data and leaves a hole"),
        ({"x": entry()}, b"1" * 7, "x: ends at byte 8 of the data, but the file has 7"),
        ({"x": entry()}, b"1" * 9, "the tensors end at byte"),
        ({"x": entry(), "__metadata__": {"a": "b"}}, b"1" * 9, "the tensors end at byte"),
        (
            b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{}}',
            b"1" * 8,
            "the key 'x' occurs twice",
        ),
        (b'{"x":NaN}', b"", "NaN is not a number"),
        (b"[1]", b"", "its header is no JSON object"),
        (b"{", b"", "its header would take 1 bytes"),
        (b"{,}", b"", "not valid JSON"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "its header is no JSON object"),
    ],
)
def test_hand_made_safetensors_headers_are_refused(tmp_path, header, data, message):
    path = safetensors(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors(path)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match=rf"its header would take {length} bytes"):
        read_safetensors(safetensors(tmp_path / "x.safetensors", {"x": entry()}, b"1" * 8, length))


def test_what_the_safetensors_library_refuses_is_refused_here(tmp_path):
    """The twin: every case is an error of both, or loads to the same values in both."""
    from safetensors.torch import load_file, save_file

    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        tmp_path / "x.safetensors",
    )
    data = (tmp_path / "x.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    loads = 0
    cases = [
        *fuzzed(data, range(end), 300, random.Random(8)),
        *bit_flips(data, range(end), 300, random.Random(9)),
    ]
    for case in cases:
        (tmp_path / "x.safetensors").write_bytes(case)
        try:
            theirs = load_file(tmp_path / "x.safetensors")
        except Exception:
            with pytest.raises(CheckpointError):
                read_safetensors(tmp_path / "x.safetensors")
            continue
        try:
            ours, _ = read_safetensors(tmp_path / "x.safetensors")
        except CheckpointError:
            continue  # stricter is allowed
        loads += 1
        assert_equal(ours, theirs)
    assert loads > 5


def test_unaligned_tensors_are_copied_and_equal(tmp_path):
    header = {"x": entry("U8", (3,), (0, 3)), "y": entry("F32", (2,), (3, 11))}
    path = safetensors(tmp_path / "x.safetensors", header, b"abc" + struct.pack("<2f", 1.5, -2.5))
    tensors, _ = read_safetensors(path)
    assert tensors["y"].tolist() == [1.5, -2.5]
