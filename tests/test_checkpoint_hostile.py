import io
import json
import os
import pickle
import random
import struct
import time
import zipfile

import pytest
import torch
from checkpoints import LINUX, assert_equal, sample, state, write_gguf, write_hf, write_meta
from hostile import bit_flips, fuzzed, sweep, truncations
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.checkpoint import CheckpointError, open_checkpoint
from llama.checkpoint.gguf_file import GGUFFile
from llama.checkpoint.safetensors_file import read_safetensors
from llama.checkpoint.tensor_file import read_tensor_file
from llama.checkpoint.torch_file import read_torch_file

pytestmark = pytest.mark.skipif(not LINUX, reason="the processes of POSIX")
FORMATS = ("meta", "hf", "bin", "gguf")


class Sample:
    """A small checkpoint of one format; `file` is to be damaged, `header` are the bytes that are no tensor's."""

    def __init__(self, folder, name):
        args, weights = sample(dim=16, n_heads=2, n_kv_heads=1, vocab_size=24, hidden_dim=20, head_dim=8)
        if name == "meta":
            more = {"hidden_dim": args.hidden_dim, "head_dim": args.head_dim}
            self.path = write_meta(folder / "model", args, weights, **more)
            self.file = self.path / "consolidated.00.pth"
        elif name == "gguf":
            self.path = self.file = write_gguf(folder / "model.gguf", args, weights)
        else:
            self.path = write_hf(folder / "model", args, weights, binary=name == "bin", head_dim=8)
            self.file = self.path / ("pytorch_model.bin" if name == "bin" else "model.safetensors")
        self.data = self.file.read_bytes()
        self.tensors = sorted(self._tensors(name))
        inside = {place for start, stop in self.tensors for place in range(start, stop)}
        self.header = [place for place in range(len(self.data)) if place not in inside]
        self.weights = state(self.path)

    def _tensors(self, name):
        """First and last byte of each tensor in the file."""
        if name == "gguf":
            headers = GGUFFile(self.file).tensors.values()
            return [(header.offset, header.offset + header.nbytes) for header in headers]
        if name == "hf":
            start = 8 + int.from_bytes(self.data[:8], "little")
            entries = json.loads(self.data[8:start])
            offsets = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
            return [(start + first, start + last) for first, last in offsets]
        spans = []
        with zipfile.ZipFile(self.file) as archive:
            for member in archive.infolist():
                lengths = struct.unpack("<HH", self.data[member.header_offset + 26 : member.header_offset + 30])
                start = member.header_offset + 30 + sum(lengths)
                if "/data/" in member.filename:
                    spans.append((start, start + member.file_size))
        return spans

    def sweep(self, cases):
        sweep(self.path, self.file, cases, self.weights)


@pytest.fixture(params=FORMATS)
def model(request, tmp_path):
    return Sample(tmp_path, request.param)


def test_the_sample_itself_loads(model):
    assert model.weights
    model.sweep([model.data])
    assert len(model.header) > 500
    assert len(model.tensors) == 21 + (model.path / "params.json").exists()


def test_a_change_of_values_would_be_noticed(model):
    start, _ = model.tensors[1]
    changed = bytearray(model.data)
    changed[start + 1] ^= 64
    with pytest.raises(AssertionError, match="was loaded with other values"):
        model.sweep([bytes(changed)])


def test_a_file_cut_anywhere_is_an_error_with_its_name(model):
    boundaries = [place for span in model.tensors for place in span]
    cases = list(truncations(model.data, boundaries, random.Random(1)))
    model.sweep(cases)
    model.file.write_bytes(cases[len(cases) // 2])
    with pytest.raises(CheckpointError, match=model.file.name):
        state(model.path)


def test_a_tensor_that_is_cut_off_is_named(tmp_path):
    for name in ("hf", "gguf"):
        one = Sample(tmp_path / name, name)
        one.file.write_bytes(one.data[: one.tensors[-1][1] - 1])
        with pytest.raises(CheckpointError, match=r"(norm|proj|output\w*)\.weight: ends at byte"):
            open_checkpoint(one.path)


def test_one_bit_of_a_header_changes_nothing_unnoticed(model):
    model.sweep(bit_flips(model.data, model.header, 200, random.Random(2)))


@pytest.mark.slow
def test_two_thousand_bits_of_a_header_change_nothing_unnoticed(model):
    model.sweep(bit_flips(model.data, model.header, 2000, random.Random(3)))


def harmless(cases, tensors):
    """Cases whose tensor bytes are those of the sample: a fuzzed header may well move what lies behind it."""
    return cases


def test_fuzzed_headers_are_errors_or_load(model):
    model.sweep_fuzzed(200, 4) if hasattr(model, "sweep_fuzzed") else fuzz(model, 200, 4)


@pytest.mark.slow
def test_twenty_thousand_fuzzed_headers_are_errors_or_load(model):
    fuzz(model, 20_000, 5)


def fuzz(model, count, seed):
    """Several changes at once can agree with each other, so only the handling is checked, not the values."""
    sweep(model.path, model.file, fuzzed(model.data, model.header, count, random.Random(seed)), {})
