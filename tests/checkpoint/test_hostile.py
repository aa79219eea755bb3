import json
import os
import random
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import LINUX, assert_equal, sample, state, write_gguf, write_hf, write_meta
from support.hostile import bit_flips, fuzzed, sweep, truncations

from llama.checkpoint import CheckpointError, open_checkpoint
from llama.files.gguf import GGUFFile
from llama.files.tensor_file import read_tensor_file

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

    def sweep(self, cases, values=True):
        sweep(self.path, self.file, cases, self.weights if values else None)


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


def test_fuzzed_headers_are_errors_or_load(model):
    """Several changes at once may agree with each other, so that only the handling is checked, not the values."""
    model.sweep(fuzzed(model.data, model.header, 200, random.Random(4)), values=False)


@pytest.mark.slow
def test_twenty_thousand_fuzzed_headers_are_errors_or_load(model):
    model.sweep(fuzzed(model.data, model.header, 20_000, random.Random(5)), values=False)


@pytest.mark.parametrize("name", ["params.json", "config.json", "model.safetensors.index.json"])
def test_fuzzed_settings_are_errors_or_load(tmp_path, name):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights) if name == "params.json" else write_hf(tmp_path, args, weights, 2)
    data = (path / name).read_bytes()
    cases = [*truncations(data, [], random.Random(6)), *fuzzed(data, range(len(data)), 300, random.Random(7))]
    sweep(path, path / name, cases, None)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = {
    "params.json": ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
                    "norm_eps", "hidden_dim", "head_dim", "rope_theta", "rope_scaling", "use_scaled_rope",
                    "rope_scaling_factor", "max_seq_len", "sliding_window", "moe", "causal"],
    "config.json": ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
                    "rms_norm_eps", "intermediate_size", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
                    "tie_word_embeddings", "mlp_bias", "model_type", "architectures", "eos_token_id",
                    "max_position_embeddings", "quantization_config", "hidden_act", "sliding_window"],
    "generation_config.json": ["temperature", "top_p", "top_k", "do_sample", "eos_token_id", "max_length"],
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_settings_of_any_type_and_value_are_errors_or_load(tmp_path, name):
    args, weights = sample(n_layers=1)
    writer = write_meta if name == "params.json" else write_hf
    path = writer(tmp_path, args, weights)
    good = json.loads((path / name).read_text()) if (path / name).exists() else {}

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.dictionaries(st.sampled_from(KEYS[name]), ANYTHING, min_size=1, max_size=3))
    def attempt(changes):
        (path / name).write_text(json.dumps(good | changes))
        message = ""
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            message = str(error)
        assert "\n" not in message

    attempt()


# --- files that are none, or change -----------------------------------------------------------------------------


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_no_crash(model):
    checkpoint = open_checkpoint(model.path)
    os.truncate(model.file, model.tensors[0][0])
    with pytest.raises(CheckpointError, match=r"has \d+ now; open it again") as error:
        state(checkpoint)
    assert model.file.name in str(error.value)
    assert ".weight" in str(error.value)


def test_a_file_that_is_replaced_after_it_was_opened_keeps_its_old_values(model):
    checkpoint = open_checkpoint(model.path)
    other = model.file.with_name("other")
    other.write_bytes(bytes(len(model.data)))
    os.replace(other, model.file)
    assert_equal(state(checkpoint), model.weights)
    model.file.unlink()
    assert_equal(state(checkpoint), model.weights)


def test_what_is_no_ordinary_file_is_refused_at_once(model):
    model.file.unlink()
    os.mkfifo(model.file)
    with pytest.raises(CheckpointError):
        open_checkpoint(model.path)
    with pytest.raises(CheckpointError, match="is no ordinary file"):
        read_tensor_file(model.file)


def test_an_empty_file_is_refused(model):
    model.file.write_bytes(b"")
    with pytest.raises(CheckpointError):
        open_checkpoint(model.path)
