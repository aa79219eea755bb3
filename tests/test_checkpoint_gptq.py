import json

import pytest
import torch
from checkpoints import hf_weights, loaded, sample, state, write_hf
from safetensors.torch import load_file, save_file

from llama.checkpoint import CheckpointError, open_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: torch.Tensor, order=range(8)) -> torch.Tensor:
    """int (n, m) of 0..15 -> int32 (n, m / 8), one number after the other."""
    rows, columns = values.shape
    packed = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for row in range(rows):
        for column in range(columns // 8):
            for place, offset in enumerate(order):
                packed[row, column] |= int(values[row, column * 8 + offset]) << (4 * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def quantize(outputs: int, inputs: int, group_size: int, method: str, act_order: bool, seed: int):
    """Random four-bit parts of one linear, and the matrix (out, in) that they stand for, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = -(-inputs // group_size)
    integers = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 16, (num_groups, outputs), generator=generator)
    scales = (torch.rand(num_groups, outputs, generator=generator) / 50 + 0.01).half()
    groups = torch.arange(inputs) // group_size
    if act_order:
        groups = groups[torch.randperm(inputs, generator=generator)]
    matrix = torch.empty(outputs, inputs)
    for i in range(inputs):
        for o in range(outputs):
            matrix[o, i] = (integers[i, o] - zeros[groups[i], o]) * scales[groups[i], o].float()
    if method == "awq":
        parts = {"qweight": pack(integers, AWQ_ORDER), "qzeros": pack(zeros, AWQ_ORDER)}
    else:
        stored = zeros if method == "gptq_v2" else (zeros - 1) % 16
        parts = {"qweight": pack(integers.T).T.contiguous(), "qzeros": pack(stored), "g_idx": groups.int()}
    return parts | {"scales": scales}, matrix


def write(path, method: str, group_size: int = 16, act_order: bool = False, **config):
    """A model whose linears are in four bits, and its dequantized weights in Meta's names and order."""
    args, weights = sample(n_layers=1, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48)
    plain = hf_weights(args, weights)
    stored, matrices = {}, {}
    for seed, (name, weight) in enumerate(plain.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = matrices[name] = weight
            continue
        parts, matrices[name] = quantize(*weight.shape, group_size, method, act_order, seed)
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    quantization = {"quant_method": "awq" if method == "awq" else "gptq", "bits": 4, "group_size": group_size}
    quantization |= {} if method == "awq" else {"checkpoint_format": method}
    write_hf(path / "model", args, weights, quantization_config=quantization | config)
    save_file(stored, path / "model" / "model.safetensors")
    write_hf(path / "plain", args, weights)
    save_file(matrices, path / "plain" / "model.safetensors")
    return path / "model", path / "plain"


@pytest.mark.parametrize(
    "group_size", [8, 16, 1000]
)  # 1000: one group for all inputs, as group_size -1 means
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
    save_file(
        {name: t for name, t in tensors.items() if not name.endswith("g_idx")}, path / "model.safetensors"
    )
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
        ("gptq", {"bits": 8}, "bits is 8, but only 4 are supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "quantization 'gptq' in format 'marlin' is not supported"),
        ("awq", {"version": "gemv"}, "quantization 'awq' in format 'gemv' is not supported"),
        ("awq", {"quant_method": "fp8"}, "quantization 'fp8' in format 'gptq' is not supported"),
    ],
)
def test_methods_that_are_not_known_are_refused(tmp_path, method, config, message):
    path, _ = write(tmp_path, method, **config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


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
