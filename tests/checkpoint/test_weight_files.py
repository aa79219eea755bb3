"""Which of the files in a Hugging Face directory count, and what of them changes nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import assert_equal, loaded, sample, state, write_gguf, write_hf

from llama.checkpoint import CheckpointError, convert, inspect, open_checkpoint, save_low_bit, verify


def two_models(tmp_path):
    """The same shape with other weights, twice."""
    args, weights = sample()
    return args, weights, {name: weight + 1 for name, weight in weights.items()}


def add(path, **tensors):
    """Stores more tensors in a directory's model.safetensors."""
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("binary", [False, True])
def test_the_single_file_counts_and_an_index_beside_it_is_passed_over(tmp_path, binary):
    args, new, old = two_models(tmp_path)
    write_hf(tmp_path, args, old, 2, binary)
    write_hf(tmp_path, args, new)
    checkpoint = open_checkpoint(tmp_path)
    assert_equal(state(checkpoint), new)
    [warning] = checkpoint.warnings
    assert "index.json: is passed over: model.safetensors is read" in warning


def test_safetensors_count_before_bin_files(tmp_path):
    args, new, old = two_models(tmp_path)
    write_hf(tmp_path, args, old, binary=True)
    write_hf(tmp_path, args, new, 2)
    checkpoint = open_checkpoint(tmp_path)
    assert_equal(state(checkpoint), new)
    [warning] = checkpoint.warnings
    assert "pytorch_model.bin: is passed over: model.safetensors.index.json is read" in warning


def test_what_is_passed_over_is_said_by_every_command(tmp_path):
    args, new, old = two_models(tmp_path)
    write_hf(tmp_path / "model", args, old, binary=True)
    write_hf(tmp_path / "model", args, new)
    [warning] = inspect(tmp_path / "model").warnings
    assert "pytorch_model.bin: is passed over" in warning
    assert warning in convert(tmp_path / "model", tmp_path / "copy", "meta")
    assert any("is passed over" in finding.message for finding in verify(tmp_path / "model"))


def test_an_index_of_absent_shards_does_not_hide_a_whole_file(tmp_path):
    args, weights, _ = two_models(tmp_path)
    write_hf(tmp_path, args, weights, binary=True)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert_equal(state(checkpoint), weights)
    [warning] = checkpoint.warnings
    assert "is passed over: lm_head.weight: its file model-00001-of-00002.safetensors is missing" in warning


def test_an_index_of_absent_shards_alone_is_refused(tmp_path):
    args, weights, _ = two_models(tmp_path)
    write_hf(tmp_path, args, weights, 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"its file model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_tensors_that_change_nothing_refuse_no_model(tmp_path):
    args, weights = sample()
    write_hf(tmp_path, args, weights)
    names = [f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(2) for kind in "kv"]
    names += ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.attn.k_zero_point"]
    add(tmp_path, **{name: torch.ones(1) for name in names})
    assert_equal(state(tmp_path), weights)


def test_an_index_may_list_what_changes_nothing_and_no_file_has(tmp_path):
    args, weights = sample(tie_word_embeddings=True)
    write_hf(tmp_path, args, weights, 2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = next(iter(index["weight_map"].values()))
    more = ["lm_head.weight", "model.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale"]
    file.write_text(json.dumps({"weight_map": index["weight_map"] | dict.fromkeys(more, shard)}))
    assert_equal(state(tmp_path), weights)
    assert open_checkpoint(tmp_path).args.tie_word_embeddings


def test_biases_of_zeros_alone_are_no_biases(tmp_path):
    args, weights = sample(attention_bias=True)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items() if name.endswith("bias")}
    write_hf(tmp_path, args, weights | zeros)
    add(tmp_path, **{"lm_head.bias": torch.zeros(264), "model.layers.1.mlp.up_proj.bias": torch.zeros(176)})
    found = open_checkpoint(tmp_path)
    assert not found.args.attention_bias
    assert not found.args.mlp_bias
    assert set(state(found)) == set(weights) - set(zeros)


def test_biases_that_the_config_does_not_mention_are_used(tmp_path):
    args, weights = sample(attention_bias=True, attention_output_bias=True, mlp_bias=True)
    path = write_hf(tmp_path, args, weights)
    assert "bias" not in (path / "config.json").read_text()
    assert_equal(dict(loaded(path).named_parameters()), weights)


def test_a_bias_that_no_model_has_is_still_unexpected(tmp_path):
    args, weights = sample()
    write_hf(tmp_path, args, weights)
    add(tmp_path, **{"lm_head.bias": torch.ones(264)})
    with pytest.raises(CheckpointError, match=r"output\.bias is unexpected"):
        loaded(tmp_path)


def test_a_config_beside_a_gguf_file_hides_it_only_where_there_are_other_weights(tmp_path):
    args, weights, others = two_models(tmp_path)
    write_gguf(tmp_path / "m.gguf", args, weights)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(tmp_path).format == "gguf"
    assert_equal(state(tmp_path), weights)
    write_hf(tmp_path, args, others)
    assert_equal(state(tmp_path), others)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("llama", "LLaMAForCausalLM"), ("llama", "LlamaModel"), ("mistral", "MistralModel")),
        *(("aquila", "AquilaModel"), ("xverse", "XverseForCausalLM")),
    ],
)
def test_other_names_of_the_architecture_load(tmp_path, kind, name):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights, model_type=kind, architectures=[name])
    assert_equal(state(path), weights)
    assert open_checkpoint(path).has_head


def test_a_model_without_head_is_stored_without_prefix_too(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights, architectures=["LlamaModel"])
    file = path / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert not checkpoint.has_head
    del weights["output.weight"]
    assert_equal(state(checkpoint), weights)


def test_a_model_without_head_stays_one_where_the_format_can_say_so(tmp_path):
    args, weights = sample(dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256)
    del weights["output.weight"]
    source = write_hf(tmp_path / "source", args, weights, architectures=["MistralModel"], model_type="mistral")
    assert convert(source, tmp_path / "hf", "hf")
    save_low_bit(open_checkpoint(source), tmp_path / "lowbit", "sym_int4")
    for name in ("hf", "lowbit"):
        assert not open_checkpoint(tmp_path / name).has_head
    for to, name in (("meta", "meta"), ("gguf", "m.gguf")):
        assert any("there is no output layer" in line for line in convert(source, tmp_path / name, to))


def test_a_model_without_head_that_is_tied_has_one(tmp_path):
    args, weights = sample(tie_word_embeddings=True)
    assert open_checkpoint(write_hf(tmp_path, args, weights, architectures=["LlamaModel"])).has_head


def test_scales_of_weights_are_not_scales_of_a_cache(tmp_path):
    args, weights = sample()
    write_hf(tmp_path, args, weights)
    add(tmp_path, **{"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale is unexpected"):
        loaded(tmp_path)


def test_whole_numbers_that_no_setting_explains_are_refused(tmp_path):
    args, weights = sample()
    write_hf(tmp_path, args, weights)
    add(tmp_path, **{"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"wq\.weight: holds int8, and the settings do not say"):
        open_checkpoint(tmp_path)
