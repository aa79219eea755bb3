import math
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.checkpoints import assert_equal, byte_vocabulary, loaded, sample, state, write_gguf

from llama.checkpoint import CheckpointError, open_checkpoint
from llama.files.gguf import BLOCKS, BOOL, STRING, UINT32, GGUFFile, Value, shortest
from llama.files.gguf import write_gguf as write_container
from llama.files.writing import Entry
from llama.rotary import LinearScaling, Llama3Scaling, YarnScaling, rope_factors


def write(path, metadata, tensors=()):
    """A GGUF file by our container writer, for headers that the gguf package would not write."""
    outputs = [Entry(name, tuple(data.shape), data.dtype, lambda data=data: data) for name, data in tensors]
    write_container(path, outputs, metadata, lambda nbytes: None)
    return path


def edit(path, **changes):
    """Rewrites a sample file with changed metadata; None removes a key."""
    file = GGUFFile(path)
    values = {}
    for key, value in file.scalars().items():
        kind = {str: STRING, int: UINT32, float: 6, bool: 7}[type(value)]
        values[key] = Value(kind, value)
    for key, value in changes.items():
        values.pop(key, None)
        if value is not None:
            values[key] = value
    weights = [(header.name, read(file, header)) for header in file.tensors.values()]
    return write(path, values, weights)


def read(file, header):
    return file.mapped.tensor(header.name, header.offset, torch.float32, header.shape).clone()


@pytest.fixture
def model(tmp_path):
    args, weights = sample()
    return write_gguf(tmp_path / "model.gguf", args, weights)


def test_every_block_type_has_ggmls_sizes():
    for number, (name, block, size) in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == (block, size)
        assert Kind(number).name == name


READABLE = [kind for kind in Kind if kind.value in BLOCKS and kind not in (Kind.F64,)]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_ggml_type_is_read_as_the_gguf_package_reads_it(tmp_path, kind):
    _, block, size = BLOCKS[kind]
    rows, blocks = 6, 2
    generator = np.random.default_rng(kind.value)
    packed = generator.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    header = file.tensors["blk.0.ffn_up.weight"]
    assert header.shape == (rows, blocks * block)
    with np.errstate(all="ignore"):  # random blocks hold infinite scales
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind)))

    from llama.checkpoint.formats.gguf import Blocks, array_of

    array = array_of(file, header)
    whole = array.read(0, 0, rows).float()
    assert torch.equal(whole.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    columns = blocks * block
    part = array.read(1, columns // 4, columns // 4 * 3).float()
    assert torch.equal(part.nan_to_num(7, 8, 9), expected[:, columns // 4 : columns // 4 * 3].nan_to_num(7, 8, 9))
    if isinstance(array, Blocks):
        assert torch.equal(array.packed(0, 1, 3), torch.from_numpy(packed[1:3]))
        assert torch.equal(array.packed(1, block, 2 * block), torch.from_numpy(packed[:, size:]))
        with pytest.raises(CheckpointError, match=f"are not whole {kind.name} blocks of {block}"):
            array.packed(1, 1, block)


def test_float64_is_read(tmp_path):
    path = write(tmp_path / "x.gguf", {})
    data = torch.randn(3, 4, dtype=torch.float64)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from llama.checkpoint.formats.gguf import array_of

    file = GGUFFile(path)
    assert torch.equal(array_of(file, file.tensors["x"]).read(0, 0, 3), data)


def test_low_bit_weights_load_onto_ranks_and_equal_the_whole(tmp_path):
    args, weights = sample(dim=128, n_heads=4, n_kv_heads=2, multiple_of=64)
    path = write_gguf(tmp_path / "model.gguf", args, weights, Kind.Q8_0)
    whole = state(path)
    assert open_checkpoint(path).dtype is None
    for rank in range(2):
        for name, parameter in loaded(path, rank, 2).named_parameters():
            dim = next((d for d in range(parameter.ndim) if parameter.shape[d] != whole[name].shape[d]), None)
            expected = whole[name] if dim is None else whole[name].chunk(2, dim)[rank]
            assert torch.equal(parameter, expected), name


def test_packed_blocks_of_a_rank_are_the_bytes_in_the_file(tmp_path):
    args, weights = sample(dim=96, n_heads=6, n_kv_heads=3, multiple_of=96)
    path = write_gguf(tmp_path / "model.gguf", args, weights, Kind.Q4_1)
    wo = next(weight for weight in open_checkpoint(path).weights() if weight.name == "layers.1.attention.wo.weight")
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.attn_output.weight")
    packed, kind = wo.part(1, 2, 3).read_packed()
    assert kind == stored.tensor_type.name == "Q4_1"
    assert torch.equal(packed, torch.tensor(np.split(stored.data, 3, axis=1)[2]))
    packed, _ = wo.part(0, 1, 3).read_packed(0, 5, 7)
    assert torch.equal(packed, torch.tensor(stored.data[37:39]))
    with pytest.raises(ValueError, match="is cut along dimension 1"):
        wo.part(1, 2, 3).read_packed(0, 0, 1)


def test_numbers_stored_in_float32_are_read_as_the_shortest_decimal():
    for value in (1e-5, 1e-6, 10000.0, 500000.0, 130000.0, 0.7, 1 / 3):
        stored = struct.unpack("<f", struct.pack("<f", value))[0]
        assert struct.pack("<f", shortest(stored)) == struct.pack("<f", value)
    assert shortest(struct.unpack("<f", struct.pack("<f", 1e-5))[0]) == 1e-5
    assert np.isnan(shortest(float("nan")))
    assert shortest(float("inf")) == float("inf")


@pytest.mark.parametrize(
    "scaling",
    [
        Llama3Scaling(8.0, 1.0, 4.0, 8192),
        Llama3Scaling(32.0, 1.0, 4.0, 8192),
        Llama3Scaling(4.0, 1.0, 2.0, 64),
    ],
)
def test_llama3_scaling_is_read_from_the_factors_that_llama_cpp_stores(tmp_path, scaling):
    args, weights = sample(rope_theta=500000.0, head_dim=64)
    path = write_gguf(tmp_path / "model.gguf", args, weights)
    exponents = torch.arange(0, 64, 2).float() / 64
    wavelengths = 2 * torch.pi * args.rope_theta**exponents
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_seq_len
    factors = []  # as llama.cpp's converter computes them, one after the other
    for wavelength in wavelengths.tolist():
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(scaling.factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    assert torch.allclose(torch.tensor(factors), rope_factors(args.head_dim, args.rope_theta, scaling), rtol=1e-5)
    tensors = [(h.name, read(GGUFFile(path), h)) for h in GGUFFile(path).tensors.values()]
    values = {"rope.scaling.original_context_length": original}
    values |= {"rope.scaling.low_freq_factor": low, "rope.scaling.high_freq_factor": high} if original != 8192 else {}
    edit(path, **{f"llama.{key}": Value(6 if isinstance(v, float) else UINT32, v) for key, v in values.items()})
    metadata = GGUFFile(path).scalars()
    kinds = {str: STRING, int: UINT32, float: 6}
    header = {key: Value(kinds[type(value)], value) for key, value in metadata.items()}
    write(path, header, [("rope_freqs.weight", torch.tensor(factors)), *tensors])
    assert open_checkpoint(path).args.rope_scaling == scaling
    write(path, header, [("rope_freqs.weight", torch.tensor(factors) + torch.arange(32)), *tensors])
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: not Llama 3's rope scaling"):
        open_checkpoint(path)
    write(path, header, [("rope_freqs.weight", torch.tensor(factors[:5])), *tensors])
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: 32 factors of at least 1"):
        open_checkpoint(path)
    write(path, header, [("rope_freqs.weight", torch.ones(32)), *tensors])
    assert open_checkpoint(path).args.rope_scaling is None


def test_yarn_is_read_from_llama_cpps_keys(model):
    prefix = "llama.rope.scaling."
    keys = {f"{prefix}type": Value(STRING, "yarn"), f"{prefix}factor": Value(6, 4.0)}
    context = open_checkpoint(model).args.max_seq_len
    assert open_checkpoint(edit(model, **keys)).args.rope_scaling == YarnScaling(4.0, context)
    keys = {f"{prefix}original_context_length": Value(UINT32, 64), f"{prefix}attn_factor": Value(6, 0.8)}
    keys |= {f"{prefix}yarn_beta_fast": Value(6, 16.0), f"{prefix}yarn_beta_slow": Value(6, 2.0)}
    keys |= {f"{prefix}finetuned": Value(BOOL, True), f"{prefix}yarn_ext_factor": Value(6, 1.0)}
    checkpoint = open_checkpoint(edit(model, **keys))
    assert checkpoint.unknown_keys == ()
    longer = checkpoint.args.rope_scaling.attention_factor
    assert checkpoint.args.rope_scaling == YarnScaling(4.0, 64, 16.0, 2.0, longer)
    assert longer == pytest.approx(0.8 * (1 + 0.1 * math.log(4)), rel=1e-5)
    edit(model, **{f"{prefix}yarn_ext_factor": Value(6, 0.5)})
    with pytest.raises(CheckpointError, match=r"yarn_ext_factor = 0\.5 is not supported"):
        open_checkpoint(model)


def test_scaling_of_type_none_never_scales(model):
    keys = {"llama.rope.scaling.type": Value(STRING, "none"), "llama.rope.scaling.factor": Value(6, 4.0)}
    assert open_checkpoint(edit(model, **keys)).args.rope_scaling is None


def test_linear_scaling_is_read_in_both_spellings(model):
    keys = {"llama.rope.scaling.type": Value(STRING, "linear"), "llama.rope.scaling.factor": Value(6, 4.0)}
    assert open_checkpoint(edit(model, **keys)).args.rope_scaling == LinearScaling(4.0)
    old = {"llama.rope.scaling.type": None, "llama.rope.scaling.factor": None}
    old["llama.rope.scale_linear"] = Value(6, 2.0)
    assert open_checkpoint(edit(model, **old)).args.rope_scaling == LinearScaling(2.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", Value(STRING, "gemma"), "the architecture 'gemma' is not supported"),
        ("general.architecture", None, "the architecture None is not supported"),
        ("llama.expert_count", Value(UINT32, 8), "llama.expert_count = 8 is not supported"),
        ("llama.rope.scaling.type", Value(STRING, "longrope"), "llama.rope.scaling.type is 'longrope'"),
        ("llama.logit_scale", Value(6, 2.0), "llama.logit_scale = 2.0 is not supported"),
        ("llama.attention.causal", Value(7, False), "llama.attention.causal = False is not supported"),
        ("llama.rope.dimension_count", Value(UINT32, 4), "only the head's size, 8, is supported"),
        ("llama.attention.value_length", Value(UINT32, 4), "only the head's size, 8, is supported"),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.embedding_length", Value(STRING, "x"), "llama.embedding_length is 'x'"),
        ("llama.feed_forward_length", Value(UINT32, [1, 2]), "differs from layer to layer"),
        ("general.alignment", Value(UINT32, 3), "general.alignment is 3, which is no power of two"),
        ("llama.attention.head_count_kv", Value(UINT32, 3), "8 heads cannot share 3 key/value heads"),
    ],
)
def test_headers_that_ask_for_other_mathematics_are_refused_by_name(model, key, value, message):
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(edit(model, **{key: value}))
    assert "model.gguf" in str(error.value)


def test_unknown_keys_of_the_architecture_are_reported_and_those_of_others_are_not(model):
    path = edit(model, **{"llama.colour": Value(UINT32, 1), "general.colour": Value(UINT32, 1)})
    assert open_checkpoint(path).unknown_keys == ("llama.colour",)


def test_sampling_defaults_and_stop_ids_are_read(model):
    keys = {
        "general.sampling.temp": Value(6, 0.5),
        "general.sampling.top_k": Value(UINT32, 40),
        "tokenizer.ggml.eos_token_id": Value(UINT32, 2),
        "tokenizer.ggml.eot_token_id": Value(UINT32, 7),
    }
    checkpoint = open_checkpoint(edit(model, **keys))
    assert checkpoint.generation_defaults == {"temperature": 0.5, "top_k": 40}
    assert checkpoint.stop_ids == (2, 7)


def test_the_vocabulary_inside_is_the_tokenizer(tmp_path):
    args, weights = sample()
    path = write_gguf(tmp_path / "model.gguf", args, weights, vocabulary=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer_path == path
    tokens = GGUFFile(path).metadata["tokenizer.ggml.tokens"]
    assert tokens.length == args.vocab_size
    assert tokens.read() == byte_vocabulary(args.vocab_size).tokens


def test_the_scaling_type_none_never_scales(model):
    path = edit(
        model,
        **{"llama.rope.scaling.type": Value(STRING, "none"), "llama.rope.scaling.factor": Value(6, 4.0)},
    )
    assert open_checkpoint(path).args.rope_scaling is None


def test_a_directory_stands_for_the_one_gguf_file_in_it(model):
    assert open_checkpoint(model.parent).args == open_checkpoint(model).args
    model.with_name("other.gguf").write_bytes(model.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files; name one of them, such as model\.gguf; others: o"):
        open_checkpoint(model.parent)


def test_a_split_file_is_read_whole_from_any_of_its_parts(tmp_path):
    args, weights = sample()
    model = write_gguf(tmp_path / "whole" / "model.gguf", args, weights)
    whole = GGUFFile(model)
    tensors = [(header.name, read(whole, header)) for header in whole.tensors.values()]
    kinds = {str: STRING, int: UINT32, float: 6}
    header = {key: Value(kinds[type(value)], value) for key, value in whole.scalars().items()}
    parts = [tmp_path / f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, part in enumerate(parts):
        write(part, header if number == 0 else {"split.no": Value(UINT32, number)}, tensors[number::3])
    for path in (*parts, tmp_path):
        assert_equal(state(path), weights)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"is one of 3 files, of which m-00002-of-00003\.gguf is missing"):
        open_checkpoint(parts[2])


def test_a_tensor_in_two_parts_of_a_split_file_is_refused(tmp_path):
    args, weights = sample()
    model = write_gguf(tmp_path / "m-00001-of-00002.gguf", args, weights)
    write(tmp_path / "m-00002-of-00002.gguf", {}, [("output_norm.weight", torch.ones(64))])
    with pytest.raises(CheckpointError, match=r"norm\.weight: occurs twice"):
        open_checkpoint(model)


def test_a_header_is_parsed_once_for_the_weights_and_the_tokenizer(tmp_path, monkeypatch):
    args, weights = sample()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", args, weights, vocabulary=True))
    monkeypatch.setattr(GGUFFile, "__init__", None)
    assert checkpoint.open_tokenizer().n_words == args.vocab_size


def test_a_tokenizer_that_is_given_counts_more_than_the_one_inside(tmp_path):
    args, weights = sample()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", args, weights, vocabulary=True))
    other = write_gguf(tmp_path / "other.gguf", *sample(vocab_size=300), vocabulary=True)
    assert checkpoint.open_tokenizer(other).n_words == 300


def test_an_array_whose_strings_reach_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    strings = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, STRING, 3) + struct.pack("<Q", 2) + b"ab"
    for rest in (
        b"",
        struct.pack("<Q", 2**64 - 1) + bytes(20),
        struct.pack("<Q", 1) + b"c" + struct.pack("<Q", 9),
    ):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + strings + rest)
        with pytest.raises(CheckpointError, match="strings are announced, but"):
            GGUFFile(path)
