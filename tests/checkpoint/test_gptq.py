import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hf_weights, loaded, sample, state, write_hf

from llama.checkpoint import (
    CheckpointError,
    convert,
    inspect,
    load_weights,
    open_checkpoint,
    packed_modules,
    save_low_bit,
)
from llama.kernels import library
from llama.model import Transformer
from llama.parallel import ModelParallel
from llama.quantization import LowBitLinear, pack_modules
from llama.report import show_inspection

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BLOCKS = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256}  # a shape of whole blocks
METHODS = ["gptq", "gptq_v2", "awq"]
compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")


def pack(values: torch.Tensor, bits: int = 4, order=range(8)) -> torch.Tensor:
    """int (n, m) below 2 ** bits -> int32 (n, m * bits / 32): each row one string of bits, eight numbers in `order`."""
    rows = []
    for row in values.tolist():
        row = [row[first + offset] for first in range(0, len(row), 8) for offset in order]
        string = sum(value << bits * place for place, value in enumerate(row))
        words = [string >> first & 0xFFFFFFFF for first in range(0, len(row) * bits, 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def quantize(outputs: int, inputs: int, group_size: int, method: str, act_order: bool, seed: int, bits: int = 4):
    """Random quantized parts of one linear, and the matrix (out, in) that they stand for, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = -(-inputs // group_size)
    integers = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (num_groups, outputs), generator=generator)
    scales = (torch.rand(num_groups, outputs, generator=generator) / 50 + 0.01).half()
    groups = torch.arange(inputs) // group_size
    if act_order:
        groups = groups[torch.randperm(inputs, generator=generator)]
    q, z, s, g = integers.tolist(), zeros.tolist(), scales.tolist(), groups.tolist()
    matrix = [[(q[i][o] - z[g[i]][o]) * s[g[i]][o] for i in range(inputs)] for o in range(outputs)]
    if method == "awq":
        parts = {"qweight": pack(integers, order=AWQ_ORDER), "qzeros": pack(zeros, order=AWQ_ORDER)}
    else:
        stored = zeros if method == "gptq_v2" else (zeros - 1) % 2**bits
        parts = {
            "qweight": pack(integers.T, bits).T.contiguous(),
            "qzeros": pack(stored, bits),
            "g_idx": groups.int(),
        }
    return parts | {"scales": scales}, torch.tensor(matrix)


def write(path, method: str, group_size: int = 16, act_order: bool = False, shape=None, **config):
    """A model whose linears are in four bits, and its dequantized weights in Meta's names and order."""
    shape = shape or {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    args, weights = sample(n_layers=1, **shape)
    plain = hf_weights(args, weights)
    stored, matrices = {}, {}
    for seed, (name, weight) in enumerate(plain.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = matrices[name] = weight
            continue
        parts, matrices[name] = quantize(*weight.shape, group_size, method, act_order, seed, config.get("bits", 4))
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    quantization = {"quant_method": "awq" if method == "awq" else "gptq", "bits": 4, "group_size": group_size}
    quantization |= {} if method == "awq" else {"checkpoint_format": method}
    write_hf(path / "model", args, weights, quantization_config=quantization | config)
    save_file(stored, path / "model" / "model.safetensors")
    write_hf(path / "plain", args, weights)
    save_file(matrices, path / "plain" / "model.safetensors")
    return path / "model", path / "plain"


@pytest.mark.parametrize("group_size", [8, 16, 1000])  # 1000: one group for all inputs, as group_size -1 means
@pytest.mark.parametrize(
    ("method", "act_order"),
    [("gptq", False), ("gptq", True), ("gptq_v2", False), ("gptq_v2", True), ("awq", False)],
)
def test_four_bit_directories_are_dequantized_entry_by_entry(tmp_path, method, act_order, group_size):
    path, plain = write(tmp_path, method, group_size, act_order)
    found, expected = state(path), state(plain)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name].float(), weight), name
    for rank in range(2):
        parts = dict(loaded(plain, rank, 2).named_parameters())
        for name, part in loaded(path, rank, 2).named_parameters():
            assert torch.equal(part.float(), parts[name]), name


def test_gptq_without_group_indices_takes_the_inputs_in_order(tmp_path):
    path, plain = write(tmp_path, "gptq")
    tensors = load_file(path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.endswith("g_idx")}, path / "model.safetensors")
    found, expected = state(path), state(plain)
    assert all(torch.equal(found[name].float(), weight) for name, weight in expected.items())


def test_the_settings_may_lie_in_a_file_of_their_own(tmp_path):
    path, plain = write(tmp_path, "gptq")
    config = json.loads((path / "config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (path / "config.json").write_text(json.dumps(config))
    found = state(path)
    assert all(torch.equal(found[name].float(), weight) for name, weight in state(plain).items())
    (path / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match="is in four bits, but no config names the method"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "quantization 'gptq' in format 'marlin' is not supported"),
        ("awq", {"version": "gemv"}, "quantization 'awq' in format 'gemv' is not supported"),
        (
            "awq",
            {"quant_method": "hqq"},
            "quantization 'hqq' is not supported; gptq, awq, bitsandbytes, .*unquantized",
        ),
    ],
)
def test_methods_that_are_not_known_are_refused(tmp_path, method, config, message):
    path, _ = write(tmp_path, method, **config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 5), ("awq", 8)])
def test_numbers_of_bits_that_are_not_known_are_refused(tmp_path, method, bits):
    path, _ = write(tmp_path, method)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["bits"] = bits
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"bits is {bits}, but .* can be read"):
        open_checkpoint(path)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_numbers_of_bits_are_dequantized_entry_by_entry(tmp_path, bits, act_order):
    path, plain = write(tmp_path, "gptq", 64, act_order, shape=BLOCKS, bits=bits)
    assert_same_weights(kept(path), loaded(plain))
    assert packed_names(kept(path)) == set()
    assert inspect(path).types[f"int{bits}"].packed == 0
    assert_same_weights(kept(path, rank=1, world_size=2), loaded(plain, 1, 2))


@compiled
def test_eight_bits_around_their_middle_stay_packed(tmp_path):
    path, _ = write(tmp_path, "gptq", 64, shape=BLOCKS, bits=8)
    change(path, "qzeros", lambda tensor: torch.full_like(tensor, 0x7F7F7F7F))  # each 128, less one
    model = kept(path)
    assert packed_names(model) == LINEARS
    assert {linear.format.name for linear in model.modules() if isinstance(linear, LowBitLinear)} == {"sym_int8"}
    assert_same_weights(model, kept(path, "none"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qzeros", lambda tensor: None, r"q_proj\.qzeros: is missing"),
        (
            "qzeros",
            lambda tensor: tensor[:1].clone(),
            r"q_proj\.qzeros: is int32 \[1, 4\], expected \[2, 4\]",
        ),
        ("scales", lambda tensor: tensor.int(), r"q_proj\.scales: is int32"),
        ("qweight", lambda tensor: tensor.float(), r"q_proj\.qweight: is float32"),
        ("qweight", lambda tensor: tensor[0].clone(), r"q_proj\.qweight: has shape \[32\]"),
        ("scales", lambda tensor: tensor[0].clone(), r"q_proj\.scales: has shape"),
        ("g_idx", lambda tensor: tensor + 1, "g_idx names groups outside 0 to 1"),
        ("g_idx", lambda tensor: tensor - 1, "g_idx names groups outside 0 to 1"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path, part, change, message):
    path, _ = write(tmp_path, "gptq")
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        state(path)


# --- kept packed ------------------------------------------------------------------------------------------------

LINEARS = {f"layers.0.attention.{name}" for name in ("wq", "wk", "wv", "wo")} | {
    f"layers.0.feed_forward.{name}" for name in ("w1", "w2", "w3")
}


def change(path, part: str, edit) -> None:
    """Puts `edit` of it in the place of every tensor of that name; None leaves it out."""
    tensors = load_file(path / "model.safetensors")
    edited = {name: edit(tensor) if name.endswith(part) else tensor for name, tensor in tensors.items()}
    save_file({name: t for name, t in edited.items() if t is not None}, path / "model.safetensors")


def kept(path, quantization: str | None = None, rank: int = 0, world_size: int = 1) -> Transformer:
    """A model that keeps what it can, as `Llama.build` makes it, not prepared for the kernels yet."""
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args, ModelParallel(rank, world_size))
    pack_modules(model, packed_modules(checkpoint, quantization, world_size))
    load_weights(model, checkpoint, rank=rank, world_size=world_size, dtype=torch.float32)
    return model


def assert_same_weights(model: Transformer, dense: Transformer) -> None:
    for name in LINEARS:
        linear, expected = model.get_submodule(name), dense.get_submodule(name).weight
        weight = linear.dequantize() if isinstance(linear, LowBitLinear) else linear.weight
        assert torch.equal(weight, expected), name


def packed_names(model: Transformer) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


@compiled
@pytest.mark.parametrize("group_size", [64, 128, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_groups_of_whole_blocks_stay_packed_and_stand_for_the_same_weights(tmp_path, method, group_size):
    path, plain = write(tmp_path, method, group_size, shape=BLOCKS)
    model = kept(path)
    assert packed_names(model) == LINEARS
    assert_same_weights(model, loaded(plain))
    assert model.layers[0].attention.wq.format.name == "zero_int4"
    found, expected = state(path), state(plain)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@compiled
@pytest.mark.parametrize("method", METHODS)
def test_a_kept_models_logits_are_the_dequantized_ones_within_the_activations_rounding(tmp_path, method):
    path, _ = write(tmp_path, method, 64, shape=BLOCKS)
    model, dense = kept(path), kept(path, "none")
    model.prepare()
    tokens = torch.tensor([[1, 5, 9, *range(30, 60)]])
    expected = dense(tokens, 0)
    assert (model(tokens, 0) - expected).norm() / expected.norm() < 0.05


@compiled
def test_group_indices_may_be_left_out(tmp_path):
    path, plain = write(tmp_path, "gptq", 64, shape=BLOCKS)
    change(path, "g_idx", lambda tensor: None)
    model = kept(path)
    assert packed_names(model) == LINEARS
    assert_same_weights(model, loaded(plain))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wider_scales_are_kept_if_float16_holds_them(tmp_path, dtype):
    path, _ = write(tmp_path, "awq", 64, shape=BLOCKS)
    change(path, "scales", lambda tensor: tensor.bfloat16().to(dtype))
    model = kept(path)
    assert packed_names(model) == LINEARS
    assert_same_weights(model, kept(path, "none"))


@compiled
@pytest.mark.parametrize("scale", [1 + 2**-12, 1e-9, 1e6, float("nan")])
def test_scales_that_float16_does_not_hold_are_dequantized(tmp_path, scale):
    path, _ = write(tmp_path, "gptq", 64, shape=BLOCKS)
    change(path, "q_proj.scales", lambda tensor: tensor.float().index_fill(1, torch.tensor(5), scale))
    assert packed_names(kept(path)) == LINEARS - {"layers.0.attention.wq"}
    assert kept(path).layers[0].attention.wq.weight.dtype == torch.float32


@compiled
@pytest.mark.parametrize(
    ("group_size", "act_order", "shape"),
    [
        (64, True, BLOCKS),
        (32, False, BLOCKS),
        (96, False, BLOCKS),
        (1000, False, {"dim": 96, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96}),
    ],
    ids=["act order", "small groups", "groups that end within a block", "rows that end within a block"],
)
def test_what_does_not_fit_into_blocks_is_dequantized(tmp_path, group_size, act_order, shape):
    path, plain = write(tmp_path, "gptq", group_size, act_order, shape=shape)
    assert packed_names(kept(path)) == set()
    assert_same_weights(kept(path), loaded(plain))
    assert inspect(path).types["int4"].packed == 0


@compiled
def test_one_weight_in_act_order_leaves_the_others_packed(tmp_path, capsys):
    path, _ = write(tmp_path, "gptq", 64, shape=BLOCKS)
    change(path, "v_proj.g_idx", lambda tensor: tensor.flip(0).roll(1))
    model = kept(path)
    assert packed_names(model) == LINEARS - {"layers.0.attention.wv"}
    model.prepare()
    dense, tokens = kept(path, "none"), torch.tensor([[1, 5, 9]])
    assert (model(tokens, 0) - dense(tokens, 0)).norm() / dense(tokens, 0).norm() < 0.05
    show_inspection(inspect(path))
    assert "6 kept packed, 1 dequantized" in capsys.readouterr().out


@compiled
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_keep_the_whole_blocks_of_their_part_and_dequantize_the_rest(tmp_path, method, world_size):
    path, plain = write(tmp_path, method, 128, shape=BLOCKS | {"n_kv_heads": 4, "hidden_dim": 384})
    split_within_blocks = {"layers.0.attention.wo", "layers.0.feed_forward.w2"} if world_size == 4 else set()
    for rank in range(world_size):
        model = kept(path, None, rank, world_size)
        assert packed_names(model) == LINEARS - split_within_blocks
        assert_same_weights(model, loaded(plain, rank, world_size))
    assert inspect(path, world_size).types["int4"].packed == len(LINEARS - split_within_blocks)


@compiled
def test_none_unpacks_and_a_named_format_packs_anew(tmp_path):
    path, plain = write(tmp_path, "awq", 64, shape=BLOCKS)
    assert packed_names(kept(path, "none")) == set()
    assert_same_weights(kept(path, "none"), loaded(plain))
    assert kept(path, "sym_int8").layers[0].attention.wq.format.name == "sym_int8"


def test_without_kernels_everything_is_dequantized(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "AVAILABLE", False)
    path, plain = write(tmp_path, "gptq", 64, shape=BLOCKS)
    assert packed_names(kept(path)) == set()
    assert_same_weights(kept(path), loaded(plain))
    assert inspect(path).types["int4"].packed == 0


@compiled
def test_an_inspection_says_what_stays_packed(tmp_path, capsys):
    path, _ = write(tmp_path, "awq", 64, shape=BLOCKS)
    show_inspection(inspect(path))
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("stored int4")).endswith(", kept packed")
    assert next(line for line in lines if line.startswith("stored float32")).endswith("KiB")


@compiled
@pytest.mark.parametrize("method", METHODS)
def test_saved_in_their_own_blocks_they_lose_nothing(tmp_path, method):
    path, plain = write(tmp_path, method, 64, shape=BLOCKS)
    save_low_bit(open_checkpoint(path), tmp_path / "saved", "zero_int4")
    convert(path, tmp_path / "dense", to="meta", dtype="fp32")
    assert_same_weights(kept(tmp_path / "saved"), loaded(plain))
    assert_same_weights(kept(tmp_path / "dense"), loaded(plain))


@compiled
def test_parts_of_a_kept_weight_are_read_alike_packed_and_not(tmp_path):
    path, plain = write(tmp_path, "awq", 64, shape=BLOCKS)
    expected = {weight.name: weight for weight in open_checkpoint(plain).weights()}
    for weight in open_checkpoint(path).weights():
        if not weight.is_packed:
            continue
        for dim, start, stop in ((0, 3, 37), (0, 5, 5), (1, 64, 128), (1, 7, 70)):
            part = expected[weight.name].read(dim, start, stop)
            assert torch.equal(weight.read(dim, start, stop), part), weight.name
        assert weight.read_packed(1, 64, 128)[0].shape == (weight.shape[0], 35)
        with pytest.raises(CheckpointError, match="are not whole zero_int4 blocks of 64"):
            weight.read_packed(1, 7, 70)
