import json

import pytest
import torch
from support.checkpoints import assert_equal, loaded, params, sample, state, write_meta

from llama.checkpoint import CheckpointError, open_checkpoint
from llama.rotary import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling


def rewrite(path, **changes):
    """Changes params.json; a value of None removes the key."""
    values = json.loads((path / "params.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (path / "params.json").write_text(json.dumps(kept))
    return path


@pytest.fixture
def model(tmp_path):
    args, weights = sample()
    return write_meta(tmp_path / "model", args, weights, 2)


def test_a_stray_file_does_not_count_as_a_shard(model):
    torch.save({"x": torch.zeros(1)}, model / "optimizer.pth")
    torch.save({"x": torch.zeros(1)}, model / "consolidated.00.pth.old.pth")
    assert_equal(state(model), sample()[1])


def test_any_pth_files_count_where_none_has_metas_name(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights, 2)
    (path / "consolidated.00.pth").rename(path / "a.pth")
    (path / "consolidated.01.pth").rename(path / "b.pth")
    assert_equal(state(path), weights)


def test_a_gap_in_the_shards_numbers_is_named(model):
    (model / "consolidated.01.pth").rename(model / "consolidated.03.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth, consolidated\.02\.pth missing"):
        open_checkpoint(model)


def test_shards_of_different_types_are_refused(model):
    resave(model, 1, lambda weights: weights.update({"output.weight": weights["output.weight"].half()}))
    with pytest.raises(CheckpointError, match=r"output\.weight: the shards' shapes or types do not fit"):
        open_checkpoint(model)


def test_shards_in_safetensors_under_mistrals_name_are_read(tmp_path):
    from safetensors.torch import save_file

    args, weights = sample()
    (tmp_path / "params.json").write_text(json.dumps(params(args) | {"vocab_size": args.vocab_size}))
    save_file(weights, tmp_path / "consolidated.safetensors")
    assert_equal(state(tmp_path), weights)


def test_more_than_ten_shards_keep_their_numerical_order(tmp_path):
    args, weights = sample(n_heads=16, n_kv_heads=16, multiple_of=64, vocab_size=272)
    path = write_meta(tmp_path, args, weights, 16)
    assert_equal(state(path), weights)


def test_vocab_size_is_that_of_the_embedding_and_must_agree_where_it_is_stated(model):
    assert open_checkpoint(model).args.vocab_size == 264
    assert open_checkpoint(rewrite(model, vocab_size=264)).args.vocab_size == 264
    with pytest.raises(CheckpointError, match=r"vocab_size is 999, but tok_embeddings\.weight has 264 rows"):
        open_checkpoint(rewrite(model, vocab_size=999))


@pytest.mark.parametrize(
    ("changes", "scaling", "context"),
    [
        ({}, None, 4096),
        ({"norm_eps": 1e-6}, None, 4096),
        ({"norm_eps": 1e-6, "n_kv_heads": None}, None, 2048),
        ({"rope_theta": 500000.0}, None, 8192),
        ({"rope_theta": 500000}, None, 8192),
        ({"rope_freq_base": 500000.0}, None, 8192),
        ({"rope_theta": 1e6}, None, 16384),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, Llama3Scaling(8.0, 1.0, 4.0, 8192), 131072),
        ({"use_scaled_rope": False, "rope_theta": 500000.0}, None, 8192),
        ({"use_scaled_rope": True, "rope_scaling_factor": 32}, Llama3Scaling(32.0, 1.0, 4.0), 131072),
        ({"use_scaled_rope": True, "high_freq_factor": 8}, Llama3Scaling(8.0, 1.0, 8.0), 131072),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, LinearScaling(4.0), 16384),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192}},
            YarnScaling(4.0, 8192),
            32768,
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 4096}},
            DynamicScaling(2.0, 4096),
            4096,
        ),
        ({"max_seq_len": 100}, None, 100),
    ],
)
def test_rotary_settings_and_the_context_that_they_imply(tmp_path, changes, scaling, context):
    n_kv_heads = 8 if changes.get("n_kv_heads", 0) is None else 4
    args, weights = sample(n_kv_heads=n_kv_heads)
    checkpoint = open_checkpoint(rewrite(write_meta(tmp_path, args, weights), **changes))
    assert checkpoint.args.rope_scaling == scaling
    assert checkpoint.args.max_seq_len == context
    assert checkpoint.args.rope_theta == changes.get("rope_theta", changes.get("rope_freq_base", 10000.0))
    assert checkpoint.unknown_keys == ()


@pytest.mark.parametrize(("dim", "n_layers", "factor"), [(2048, 16, 32), (3072, 28, 32), (4096, 32, 8), (2048, 15, 8)])
def test_llama_3_2_small_models_are_scaled_by_32_though_their_files_do_not_say_so(tmp_path, dim, n_layers, factor):
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": 8, "use_scaled_rope": True}
    (tmp_path / "params.json").write_text(json.dumps(shape))
    weights = {
        "tok_embeddings.weight": torch.zeros(4, dim),
        f"layers.{n_layers - 1}.ffn_norm.weight": torch.zeros(dim),
    }
    torch.save(weights, tmp_path / "consolidated.00.pth")
    assert open_checkpoint(tmp_path).args.rope_scaling.factor == factor


def test_the_context_in_a_generation_config_beside_the_shards_wins(model):
    (model / "generation_config.json").write_text(json.dumps({"max_length": 777, "eos_token_id": 2}))
    checkpoint = open_checkpoint(model)
    assert checkpoint.args.max_seq_len == 777
    assert checkpoint.stop_ids == (2,)


def test_a_hidden_size_of_its_own_and_a_head_size_of_its_own_are_read(tmp_path):
    args, weights = sample(hidden_dim=40, head_dim=16)
    path = rewrite(write_meta(tmp_path, args, weights), hidden_dim=40, head_dim=16)
    assert_equal(dict(loaded(path).named_parameters()), weights)


@pytest.mark.parametrize(
    "key",
    [
        "moe",
        "num_experts",
        "use_qk_norm",
        "nope_layer_interval",
        "vision_chunk_size",
        "quantization_args",
        "yarn",
    ],
)
def test_keys_that_change_the_mathematics_are_refused_by_name(model, key):
    open_checkpoint(rewrite(model, **{key: False}))
    with pytest.raises(CheckpointError, match=rf"params\.json: {key} = .*is not supported"):
        open_checkpoint(rewrite(model, **{key: {"a": 1}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": "64"}, "dim is '64', but a whole number is allowed"),
        ({"dim": True}, "dim is True, but a whole number is allowed"),
        ({"dim": 10**30}, "a whole number from 1 to 2147483647 is allowed"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": 10**6}, "1000000 layers; up to 10000 are allowed"),
        ({"n_layers": 3}, "the config says 3 layers, but 2 are stored"),
        ({"n_heads": 7, "n_kv_heads": 4}, "7 heads cannot share 4 key/value heads"),
        ({"n_heads": 64, "n_kv_heads": 64}, "head_dim 1 is odd"),
        ({"norm_eps": -1}, "norm_eps is -1, but a number from"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2}}, "rope scaling 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling_factor": 8}, "rope_scaling_factor is 8"),
        ({"use_scaled_rope": True, "low_freq_factor": 5}, "high_freq_factor is 4"),
        ({"ffn_dim_multiplier": 1e300}, "a number from"),
        ({"hidden_dim": []}, "a whole number is allowed"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(model, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(rewrite(model, **changes))
    assert "params.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"dim": 1, "dim": 2}', '{"a": NaN}', "[" * 200_000, "\xff"])
def test_broken_json_is_refused(model, text):
    (model / "params.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"params\.json"):
        open_checkpoint(model)


def resave(path, shard, change):
    file = path / f"consolidated.{shard:02d}.pth"
    weights = torch.load(file, weights_only=True)
    change(weights)
    torch.save(weights, file)


def test_shards_that_do_not_fit_together_are_refused(tmp_path):
    def broken(number, change):
        args, weights = sample()
        path = write_meta(tmp_path / str(number), args, weights, 2)
        resave(path, 1, change)
        return path

    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: norm\.weight: is not in every shard"):
        open_checkpoint(broken(1, lambda weights: weights.pop("norm.weight")))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.attention\.wq\.weight: the shards' shapes or types do not fit"
    ):
        open_checkpoint(broken(2, lambda weights: weights.update({"layers.0.attention.wq.weight": torch.zeros(8, 3)})))
    with pytest.raises(CheckpointError, match=r"norm\.weight: has another shape in another shard"):
        open_checkpoint(broken(3, lambda weights: weights.update({"norm.weight": torch.zeros(5)})))
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: tok_embeddings\.weight: is missing"):
        open_checkpoint(broken(4, lambda weights: weights.update({"tok_embeddings.weight": torch.zeros(5)})))
    path = broken(5, lambda weights: weights.update({"norm.weight": torch.zeros(1, 2, 3)}))
    resave(path, 0, lambda weights: weights.update({"norm.weight": torch.zeros(1, 2, 3)}))
    with pytest.raises(CheckpointError, match=r"has shape \[1, 2, 3\]"):
        open_checkpoint(path)


def test_shards_of_unequal_size_are_joined_as_they_are(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights, 2, embedding_dim=0)
    matrix = weights["layers.0.attention.wq.weight"]
    for shard, rows in ((0, slice(0, 24)), (1, slice(24, 64))):
        resave(
            path,
            shard,
            lambda weights, rows=rows: weights.update({"layers.0.attention.wq.weight": matrix[rows].clone()}),
        )
    assert_equal(state(path), weights)
    wq = next(weight for weight in open_checkpoint(path).weights() if weight.name == "layers.0.attention.wq.weight")
    for start, stop in ((0, 24), (10, 50), (24, 64), (5, 6), (3, 3)):
        assert torch.equal(wq.read(0, start, stop), matrix[start:stop])
        assert torch.equal(wq.read(1, start, stop), matrix[:, start:stop])
    assert torch.equal(wq.part(0, 1, 4).read(1, 2, 9), matrix[16:32, 2:9])
    with pytest.raises(ValueError, match="is outside dimension 0"):
        wq.read(0, 10, 65)
    with pytest.raises(CheckpointError, match="cannot be cut for 5 ranks"):
        wq.part(0, 0, 5)
    with pytest.raises(CheckpointError, match="is stored as float32, not in low-bit blocks"):
        wq.read_packed()
