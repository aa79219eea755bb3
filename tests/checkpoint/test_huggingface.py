import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    assert_equal,
    hf_config,
    loaded,
    sample,
    state,
    write_hf,
    write_meta,
    write_sentencepiece,
)

from llama.checkpoint import CheckpointError, convert, open_checkpoint
from llama.checkpoint.inventory import FROM_GGUF, FROM_HF, TO_GGUF, TO_HF, deinterleave, interleave, rename
from llama.model import ModelArgs
from llama.rotary import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SHAPES = {
    "multi_head": {"num_key_value_heads": 8},
    "grouped_keys": {},
    "one_key_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3_scaling": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "linear_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn_in_its_own_way": {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 0.9}},
    "yarn_without_whole_pairs": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    "dynamic_within_its_context": {"rope_parameters": DYNAMIC},
    "dynamic_beyond_its_context": {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
    "head_size_of_its_own": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
NOT_IN_GGUF = ("yarn_without_whole_pairs", "dynamic_within_its_context", "dynamic_beyond_its_context")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def oracle(transformers, **changes):
    """A tiny random model of transformers, its biases and norms not at their trivial first values."""
    torch.manual_seed(1)
    shape = {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 120,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def logits(model) -> torch.Tensor:
    tokens = torch.randint(0, 264, (2, 90), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result = model(tokens, 0) if hasattr(model, "params") else model(tokens).logits
    return result.float()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_directory_that_transformers_wrote_gives_its_logits(tmp_path, transformers, changes):
    model = oracle(transformers, **changes)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if "head_dim" in changes else "5GB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.unknown_keys == ()
    assert torch.allclose(logits(loaded(tmp_path)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "to"),
    [(shape, to) for shape in SHAPES for to in ("hf", "meta", "gguf") if to != "gguf" or shape not in NOT_IN_GGUF],
)
def test_what_is_converted_gives_the_logits_of_transformers(tmp_path, transformers, shape, to):
    model = oracle(transformers, **SHAPES[shape])
    model.save_pretrained(tmp_path / "source")
    destination = tmp_path / ("model.gguf" if to == "gguf" else "copy")
    convert(tmp_path / "source", destination, to)
    assert_equal(state(destination), state(tmp_path / "source"))
    before, after = (open_checkpoint(path).args for path in (tmp_path / "source", destination))
    assert replace(after, multiple_of=256, ffn_dim_multiplier=None) == before
    if to == "hf":
        again = transformers.LlamaForCausalLM.from_pretrained(destination, dtype=torch.float32).eval()
        assert torch.equal(logits(again), logits(model))
    else:
        assert torch.allclose(logits(loaded(destination)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", NOT_IN_GGUF)
def test_rope_scaling_that_gguf_cannot_express_is_refused(tmp_path, transformers, shape):
    oracle(transformers, **SHAPES[shape]).save_pretrained(tmp_path / "source")
    kind = "dynamic rope scaling" if "dynamic" in shape else "yarn without truncation"
    with pytest.raises(CheckpointError, match=f"GGUF cannot express {kind}; write hf or meta"):
        convert(tmp_path / "source", tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_sliding_window_makes_a_mistral_in_both_directions(tmp_path, transformers):
    torch.manual_seed(1)
    shape = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "intermediate_size": 120, "sliding_window": 16, "rms_norm_eps": 1e-5}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape)).eval()
    model.save_pretrained(tmp_path / "source")
    assert open_checkpoint(tmp_path / "source").args.sliding_window == 16
    assert torch.allclose(logits(loaded(tmp_path / "source")), logits(model), rtol=0, atol=1e-4)
    convert(tmp_path / "source", tmp_path / "copy", "hf", shards=3)
    again = transformers.MistralForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_our_own_model_written_for_transformers_gives_our_logits(tmp_path, transformers):
    for number, changes in enumerate(({}, {"tie_word_embeddings": True}, {"attention_bias": True})):
        args, weights = sample(**changes)
        source = write_meta(tmp_path / f"meta{number}", args, weights)
        write_sentencepiece(source / "tokenizer.model")
        convert(source, tmp_path / f"hf{number}", "hf", shards=3)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / f"hf{number}", dtype=torch.float32).eval()
        assert torch.allclose(logits(model), logits(loaded(source)), rtol=0, atol=1e-4)


def test_names_are_the_same_after_a_round_trip():
    args = ModelArgs(n_layers=12, vocab_size=64)
    from llama.checkpoint import expected_shapes

    for to, back in ((TO_HF, FROM_HF), (TO_GGUF, FROM_GGUF)):
        for name, _ in expected_shapes(replace(args, attention_bias=True, mlp_bias=True)):
            assert rename(rename(name, to), back) == name
    for stranger in (
        "model.layers.0.self_attn.q_proj.scale",
        "x.weight",
        "model.layers.00.input_layernorm.weight",
        "",
    ):
        assert rename(stranger, FROM_HF) is None


def test_interleaving_is_the_inverse_of_deinterleaving_for_weights_and_biases():
    for rows in (torch.randn(24, 5), torch.randn(24)):
        for head_dim in (2, 4, 8, 24):
            there = deinterleave(rows, head_dim).reshape(rows.shape)
            assert torch.equal(interleave(there, head_dim).reshape(rows.shape), rows)
    assert interleave(torch.arange(8), 8).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave(torch.arange(8), 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rows_that_are_not_whole_heads_are_read_rightly(tmp_path):
    args, weights = sample()
    checkpoint = open_checkpoint(write_hf(tmp_path, args, weights))
    for weight in checkpoint.weights():
        if weight.name.endswith(("wq.weight", "wk.weight")):
            for start, stop in ((0, 8), (3, 21), (16, 17), (5, 32)):
                assert torch.equal(weight.read(0, start, stop), weights[weight.name][start:stop])
            assert torch.equal(weight.read(1, 3, 9), weights[weight.name][:, 3:9])


@pytest.mark.parametrize(
    ("keys", "theta", "scaling", "context"),
    [
        ({}, 10000.0, None, 4096),
        ({"rope_theta": 500000}, 500000.0, None, 4096),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            7.0,
            None,
            4096,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, LinearScaling(2.0), 8192),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True},
                "max_position_embeddings": 64,
            },
            10000.0,
            YarnScaling(4.0, 64),
            256,
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 64},
                "max_position_embeddings": 512,
            },
            10000.0,
            YarnScaling(8.0, 64),
            512,
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
                "original_max_position_embeddings": 32,
            },
            500000.0,
            YarnScaling(4.0, 32),
            4096,
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            10000.0,
            DynamicScaling(2.0, 4096),
            4096,
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            10000.0,
            Llama3Scaling(8.0, 1.0, 4.0, 64),
            4096,
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2}},
            10000.0,
            LinearScaling(2.0),
            8192,
        ),
    ],
)
def test_old_and_new_spellings_of_rotary_settings(tmp_path, keys, theta, scaling, context):
    args, weights = sample()
    checkpoint = open_checkpoint(write_hf(tmp_path, args, weights, **keys))
    assert (checkpoint.args.rope_theta, checkpoint.args.rope_scaling) == (theta, scaling)
    assert checkpoint.args.max_seq_len == context
    assert checkpoint.unknown_keys == ()


def test_keys_that_are_not_there_mean_what_they_mean_to_transformers(tmp_path, transformers):
    args, weights = sample(n_kv_heads=8)
    path = write_hf(tmp_path, args, weights)
    for kind, config in (("llama", transformers.LlamaConfig), ("mistral", transformers.MistralConfig)):
        values = hf_config(args) | {"model_type": kind, "architectures": None}
        for key in (
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
        ):
            del values[key]
        (path / "config.json").write_text(json.dumps(values))
        theirs, ours = config.from_pretrained(path), open_checkpoint(path).args
        assert ours.n_kv_heads == theirs.num_key_value_heads == 8
        assert ours.max_seq_len == theirs.max_position_embeddings
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        (path / "config.json").write_text(json.dumps(values | {"sliding_window": None}))
        assert open_checkpoint(path).args.sliding_window is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification' is not supported",
        ),
        ({"architectures": 1e-5}, "architectures is 1e-05, but a list of strings is allowed"),
        ({"architectures": ["LlamaForCausalLM", []]}, "but a list of strings is allowed"),
        ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "rope scaling 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.factor is missing"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}},
            r"beta_fast is 0, but a number from",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1.0},
            "rope_theta of 1 is too small for",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, r"rope_scaling\.factor is missing"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor = 0\.5 is not supported",
        ),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor = 0\.25 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"num_local_experts": 8}, "num_local_experts = 8 is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm = True is not supported"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0 is not supported"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier = 12\.0 is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types = .* is not supported"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantization 'torchao'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
    ],
)
def test_settings_that_change_the_mathematics_are_refused_by_name(tmp_path, keys, message):
    args, weights = sample()
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(write_hf(tmp_path, args, weights, **keys))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_change_nothing_are_not_reported(tmp_path):
    args, weights = sample()
    harmless = {
        "pretraining_tp": 4,
        "use_cache": True,
        "torch_dtype": "float16",
        "attention_dropout": 0.1,
        "hidden_act": "silu",
    }
    checkpoint = open_checkpoint(write_hf(tmp_path, args, weights, **harmless))
    assert checkpoint.unknown_keys == ()


def test_buffers_of_rotary_frequencies_are_ignored(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(load_file(path / "model.safetensors") | extra, path / "model.safetensors")
    assert_equal(dict(loaded(path).named_parameters()), weights)


def index_of(path, change):
    file = path / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    change(values["weight_map"])
    file.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", 7, "a\\b"])
def test_an_index_cannot_leave_its_directory(tmp_path, name):
    args, weights = sample()
    path = write_hf(tmp_path / "model", args, weights, 3)
    (tmp_path / "x.safetensors").write_bytes((path / "model-00001-of-00003.safetensors").read_bytes())
    index_of(path, lambda places: places.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .* is no plain file name"):
        open_checkpoint(path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    args, weights = sample()
    first = write_hf(tmp_path / "1", args, weights, 3)
    index_of(first, lambda places: places.update({"model.extra.weight": "model-00002-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors: model\.extra\.weight: is missing"):
        open_checkpoint(first)
    second = write_hf(tmp_path / "2", args, weights, 3)
    (second / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"its file model-00003-of-00003\.safetensors is missing"):
        open_checkpoint(second)
    third = write_hf(tmp_path / "3", args, weights, 3)
    part = load_file(third / "model-00001-of-00003.safetensors")
    save_file(
        part | load_file(third / "model-00002-of-00003.safetensors"),
        third / "model-00001-of-00003.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"occurs in model-00001-of-00003\.safetensors as well"):
        open_checkpoint(third)
    fourth = write_hf(tmp_path / "4", args, weights, 3)
    (fourth / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map is missing or empty"):
        open_checkpoint(fourth)


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights)
    (path / "config.json").write_text(json.dumps(hf_config(args) | {"head_dim": 48}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: 32 rows are not whole heads of 48"):
        open_checkpoint(path)


def test_nothing_in_a_directory_is_imported_or_run(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    loaded(path)
    assert not (tmp_path / "ran").exists()
