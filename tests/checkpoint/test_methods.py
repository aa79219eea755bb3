"""Directories that bitsandbytes, fp8 and compressed-tensors quantized, against what each number stands for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hf_weights, loaded, sample, state, write_hf
from torch import Tensor

from llama.checkpoint import CheckpointError, convert, inspect, load_weights, open_checkpoint, packed_modules
from llama.kernels import library
from llama.kernels.formats import NF4_LEVELS
from llama.model import Transformer
from llama.quantization import LowBitLinear, pack_modules

compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
SHAPE = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256}  # of whole blocks
ODD = {"dim": 48, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 72}  # and of none
FP4 = (
    0,
    0.0052,
    0.6667,
    1,
    0.3333,
    0.5,
    0.1667,
    0.25,
    0,
    -0.0052,
    -0.6667,
    -1,
    -0.3333,
    -0.5,
    -0.1667,
    -0.25,
)
Parts = dict[str, Tensor]  # of one matrix, by the last part of their names
Make = Callable[[int, int, torch.Generator], tuple[Parts, Tensor]]  # and what they stand for, float32 (out, in)


def bytes_of(value: dict) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def words(values: Tensor, bits: int) -> Tensor:
    """Numbers (n, m) below 2 ** bits in int32, the first in the lowest bits, each row filled up with zeros."""
    per_word = 32 // bits
    filled = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % per_word))
    total = (filled.unflatten(1, (-1, per_word)) << bits * torch.arange(per_word)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def four_bits(kind: str, block: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8) -> Make:
    def make(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        table = torch.tensor(NF4_LEVELS if kind == "nf4" else FP4)
        codes = torch.randint(0, 16, (outputs * inputs,), generator=generator)
        count = -(-len(codes) // block)
        quant_state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [outputs, inputs]}
        packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8).view(storage).view(-1, 1)
        parts = {"weight": packed, "weight.quant_map": table}
        absmax = (torch.rand(count, generator=generator) + 0.01).half().float()
        if nested:
            numbers = torch.randint(0, 256, (count,), generator=generator)
            levels = torch.randn(256, generator=generator).sort().values
            scales = torch.rand(-(-count // 16), generator=generator)
            absmax = torch.tensor([levels[n] * scales[i // 16] + 0.25 for i, n in enumerate(numbers)])
            parts |= {"weight.absmax": numbers.to(torch.uint8), "weight.nested_absmax": scales}
            parts["weight.nested_quant_map"] = levels
            quant_state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        else:
            parts["weight.absmax"] = absmax
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = bytes_of(quant_state)
        matrix = table[codes] * absmax[torch.arange(len(codes)) // block]
        return parts, matrix.view(outputs, inputs)

    return make


def eight_bits(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
    numbers = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    absmax = torch.rand(outputs, generator=generator) + 0.01
    parts = {"weight": numbers, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, numbers.float() * (absmax / 127)[:, None]


def scaled(
    dtype: torch.dtype,
    scale_name: str = "weight_scale",
    tile: tuple[int, int] | None = None,
    per_row: bool = False,
    zeros: bool = False,
    **more: Tensor,
) -> Make:
    """Numbers times one scale, one a row, or one a tile."""

    def make(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        if dtype == torch.int8:
            numbers = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        else:
            numbers = torch.randn(outputs, inputs, generator=generator).to(dtype)
        high, wide = tile or ((1 if per_row else outputs), inputs)
        size = (-(-outputs // high), -(-inputs // wide))
        scales = torch.rand(size, generator=generator) + 0.01
        at = torch.arange(outputs)[:, None] // high, torch.arange(inputs) // wide
        parts = {"weight": numbers, scale_name: scales if tile or per_row else scales.view(())}
        offsets = torch.zeros(size)
        if zeros:
            offsets = torch.randint(-9, 9, size, generator=generator, dtype=torch.int8)
            parts["weight_zero_point"] = offsets
        return parts | {name: one.clone() for name, one in more.items()}, (
            numbers.float() - offsets[at].float()
        ) * scales[at]

    return make


def packed(bits: int, group: int | None = None, zeros: bool = False, act_order: bool = False) -> Make:
    """compressed-tensors' "pack-quantized": integers counted from the lowest."""

    def make(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        half, wide = 2 ** (bits - 1), group or inputs
        numbers = torch.randint(-half, half, (outputs, inputs), generator=generator)
        size = outputs, -(-inputs // wide)
        scales = (torch.rand(size, generator=generator) + 0.01).bfloat16()
        parts = {"weight_packed": words(numbers + half, bits), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor([outputs, inputs])
        groups = torch.arange(inputs) // wide
        if act_order:
            groups = groups[torch.randperm(inputs, generator=generator)]
            parts["weight_g_idx"] = groups.int()
        offsets = torch.zeros(size)
        if zeros:
            offsets = torch.randint(-half, half, size, generator=generator)
            parts["weight_zero_point"] = words((offsets + half).T, bits).T.contiguous()
        return parts, (numbers - offsets[:, groups]) * scales.float()[:, groups]

    return make


def write(path: Path, make: Make, quantization: dict, shape: dict) -> tuple[Path, Path]:
    """A model whose linears are made by `make`, and one with what their numbers stand for."""
    args, weights = sample(n_layers=1, **shape)
    stored, plain = {}, {}
    for seed, (name, weight) in enumerate(hf_weights(args, weights).items()):
        if not name.endswith("_proj.weight"):
            stored[name] = plain[name] = weight
            continue
        parts, plain[name] = make(*weight.shape, torch.Generator().manual_seed(seed))
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    write_hf(path / "model", args, weights, quantization_config=quantization)
    save_file(stored, path / "model" / "model.safetensors")
    write_hf(path / "plain", args, weights)
    save_file(plain, path / "plain" / "model.safetensors")
    return path / "model", path / "plain"


def kept(path: Path, quantization: str | None = None) -> Transformer:
    """A model that keeps what it can, not prepared for the kernels yet."""
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    pack_modules(model, packed_modules(checkpoint, quantization))
    load_weights(model, checkpoint, dtype=torch.float32)
    return model


def formats(model: Transformer) -> set[str]:
    return {module.format.name for module in model.modules() if isinstance(module, LowBitLinear)}


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}


def packs(group: int | None = None) -> dict:
    weights = {"num_bits": 4, "type": "int", "strategy": "group" if group else "channel", "group_size": group}
    return CT | {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


TILES = {"weight_block_size": [32, 40]}
SCALE = {"input_scale": torch.ones(1)}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CASES = {
    # what is stored, the config, the format that it is kept in where rows are whole blocks
    "nf4": (four_bits("nf4"), BNB, "nf4"),
    "nf4 in larger blocks": (four_bits("nf4", 128), BNB, "nf4"),
    "nf4 with double quantization": (four_bits("nf4", nested=True), BNB, None),
    "nf4 stored as bfloat16": (four_bits("nf4", storage=torch.bfloat16), BNB, "nf4"),
    "nf4 in blocks longer than rows": (four_bits("nf4", 512), BNB, None),
    "fp4": (four_bits("fp4"), BNB, None),
    "fp4 with double quantization": (four_bits("fp4", nested=True), BNB, None),
    "LLM.int8": (eight_bits, {"load_in_8bit": True}, "sym_int8"),
    "fp8 with one scale": (scaled(E4M3, **SCALE), FP8 | {"weight_block_size": None}, None),
    "fp8 of the other kind": (scaled(E5M2), FP8, None),
    "fp8 in tiles": (scaled(E4M3, "weight_scale_inv", (32, 40)), FP8 | TILES, None),
    "FBGEMM's fp8": (scaled(E4M3, per_row=True), {"quant_method": "fbgemm_fp8"}, None),
    "float-quantized": (scaled(E4M3, per_row=True), CT | {"format": "float-quantized"}, None),
    "int-quantized": (scaled(torch.int8, per_row=True, **SCALE), CT | {"format": "int-quantized"}, "sym_int8"),
    "int-quantized with zeros": (scaled(torch.int8, per_row=True, zeros=True), CT | {"format": "int-quantized"}, None),
    "packed in 4 bits": (packed(4, 64), packs(64), "sym_int4"),
    "packed in 4 bits by rows": (packed(4), packs(), "sym_int4"),
    "packed in 4 bits, small groups": (packed(4, 24), packs(24), None),
    "packed in 4 bits with zeros": (packed(4, 64, zeros=True), packs(64), "zero_int4"),
    "packed in 4 bits, act order": (packed(4, 64, act_order=True), packs(64), None),
    "packed in 8 bits": (packed(8, 64), packs(64), "sym_int8"),
    "packed in 8 bits with zeros": (packed(8, 64, zeros=True), packs(64), None),
}  # fmt: skip


def fits(name: str, shape: dict) -> bool:
    """compressed-tensors' groups divide the rows."""
    return "small groups" not in name or all(shape[key] % 24 == 0 for key in ("dim", "hidden_dim"))


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["whole blocks", "odd sizes"])
@pytest.mark.parametrize(("make", "quantization", "format"), CASES.values(), ids=CASES)
def test_every_number_is_read_as_what_it_stands_for(tmp_path, make, quantization, format, shape, request):
    if not fits(request.node.callspec.id, shape):
        pytest.skip("groups of 24 do not divide these rows")
    path, plain = write(tmp_path, make, quantization, shape)
    found, expected = state(path), state(plain)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].float(), weight, rtol=1e-6, atol=0)
    for rank in range(2):
        parts = dict(loaded(plain, rank, 2).named_parameters())
        for name, part in loaded(path, rank, 2).named_parameters():
            torch.testing.assert_close(part.float(), parts[name], rtol=1e-6, atol=0)


@compiled
@pytest.mark.parametrize(("make", "quantization", "format"), CASES.values(), ids=CASES)
def test_what_a_format_of_ours_holds_stays_packed(tmp_path, make, quantization, format, request):
    if not fits(request.node.callspec.id, SHAPE):
        pytest.skip("groups of 24 do not divide these rows")
    path, plain = write(tmp_path, make, quantization, SHAPE)
    model, expected = kept(path), dict(loaded(plain).named_parameters())
    assert formats(model) == (set() if format is None else {format})
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            torch.testing.assert_close(module.dequantize(), expected[f"{name}.weight"], rtol=1e-6, atol=0)
    assert formats(kept(path, "none")) == set()


def test_a_quantized_directory_says_what_is_stored_and_converts_to_numbers(tmp_path):
    path, plain = write(tmp_path, four_bits("nf4", nested=True), BNB, SHAPE)
    assert inspect(path).types["nf4"].tensors == 7
    convert(path, tmp_path / "meta", to="meta", dtype=torch.float32)
    found = state(tmp_path / "meta")
    for name, weight in state(plain).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=0)


def test_scales_that_float16_does_not_hold_are_dequantized(tmp_path):
    path, _ = write(tmp_path, four_bits("nf4"), BNB, SHAPE)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight.absmax"
    tensors[name][3] = 0.1
    save_file(tensors, path / "model.safetensors")
    assert not isinstance(kept(path).layers[0].attention.wq, LowBitLinear)


def test_matrices_that_were_left_as_they_are_load_as_they_are(tmp_path):
    def make(outputs, inputs, generator):
        weight = torch.randn(outputs, inputs, generator=generator)
        return {"weight": weight, "input_scale": torch.ones(1)}, weight.clone()

    for number, quantization in enumerate((BNB, FP8, CT | {"format": "float-quantized"})):
        path, plain = write(tmp_path / str(number), make, quantization if number else BNB, ODD)
        if not number:
            tensors = load_file(path / "model.safetensors")
            save_file({k: v for k, v in tensors.items() if "input" not in k}, path / "model.safetensors")
        expected = state(plain)
        assert all(torch.equal(weight, expected[name]) for name, weight in state(path).items())


def test_scales_of_activations_and_caches_change_nothing(tmp_path):
    path, plain = write(tmp_path, scaled(E4M3, **SCALE), FP8, ODD)
    tensors = load_file(path / "model.safetensors")
    names = (
        "self_attn.k_scale",
        "self_attn.v_scale",
        "self_attn.k_proj.output_scale",
        "mlp.up_proj.output_scale",
    )
    tensors |= {f"model.layers.0.{name}": torch.ones(1) for name in names}
    save_file(tensors, path / "model.safetensors")
    expected = state(plain)
    for name, weight in state(path).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=0)


def test_numbers_of_8_bits_that_no_config_explains_are_refused(tmp_path):
    path, _ = write(tmp_path, lambda *size: ({"weight": scaled(E4M3)(*size)[0]["weight"]}, torch.zeros(1)), {}, ODD)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds float8_e4m3fn, and the settings do not say what that means"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "quantization 'hqq' is not supported; gptq, awq, bitsandbytes, .*unquantized"),
        ({"quant_method": "torchao"}, "quantization 'torchao' is not supported"),
        (CT | {"format": "nvfp4-pack-quantized"}, "'compressed-tensors' in format 'nvfp4-pack-quantized' is not"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "in format 'sparse-24-bitmask' is not"),
        (CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config is not supported"),
        (CT | {"config_groups": [1]}, r"config_groups is \[1\], but an object is allowed"),
        (CT | {"config_groups": {"g": {"weights": 4}}}, r"g\.weights is 4, but an object is allowed"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\], but two sizes are expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_name(tmp_path, quantization, message):
    path, _ = write(tmp_path, scaled(E4M3), quantization, ODD)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("make", "quantization", "part", "change", "message"),
    [
        (four_bits("nf4"), BNB, "weight.absmax", lambda t: None, r"q_proj\.weight\.absmax: is missing"),
        (four_bits("nf4"), BNB, "weight.absmax", lambda t: t[1:], r"absmax: is float32 \[35\], expected \[36\]"),
        (four_bits("nf4"), BNB, "weight", lambda t: t[1:], r"1151 bytes are not \[48, 48\] in blocks of 64"),
        (four_bits("nf4"), BNB, "weight.quant_map", lambda t: t[1:], r"quant_map: is float32 \[15\]"),
        (four_bits("nf4"), BNB, "weight.quant_state.bitsandbytes__nf4", lambda t: t[1:], "not valid JSON"),
        (
            four_bits("nf4"), BNB, "weight.quant_state.bitsandbytes__nf4",
            lambda t: bytes_of({"quant_type": "nf4", "blocksize": 64, "shape": [48, -48]}), "quant_state.shape is",
        ),
        (four_bits("nf4", nested=True), BNB, "weight.nested_quant_map", lambda t: None, "nested_quant_map: is missing"),
        (four_bits("nf4", nested=True), BNB, "weight.nested_absmax", lambda t: t[1:], "nested_absmax: is float32"),
        (four_bits("nf4", nested=True), BNB, "weight.absmax", lambda t: t.int() - 300, "absmax: is int32, expected"),
        (
            four_bits("nf4"), BNB, "weight.quant_state.bitsandbytes__nf4", lambda t: t.float(),
            "quant_state: is float32; the bytes of JSON",
        ),
        (eight_bits, BNB, "weight_format", lambda t: t.expand(2), "only matrices stored row by row"),
        (scaled(E4M3), FP8, "weight_scale", lambda t: t.expand(0, 0), "0 x 0 scales do not fit"),
        (packed(4), CT, "weight_shape", lambda t: t.float(), r"weight_shape: is float32 \[2\], expected \[2\]"),
        (packed(4), CT, "weight_shape", lambda t: t[:1], r"weight_shape: is int64 \[1\]"),
        (eight_bits, BNB, "SCB", lambda t: None, r"q_proj\.SCB: is missing"),
        (eight_bits, BNB, "SCB", lambda t: t[1:], r"SCB: is float32 \[47\], expected \[48\]"),
        (eight_bits, BNB, "weight_format", lambda t: t + 1, "only matrices stored row by row"),
        (scaled(E4M3), FP8, "weight_scale", lambda t: None, r"q_proj\.weight_scale: is missing"),
        (scaled(E4M3), FP8, "weight", lambda t: t.view(torch.uint8), "weight: is uint8; int8, .* is expected"),
        (scaled(E4M3, tile=(32, 40)), FP8, "weight_scale", lambda t: t.repeat(5, 1), "10 x 2 scales do not fit"),
        (packed(4), CT, "weight_shape", lambda t: t + 8, r"weight_packed: int32 \[48, 6\] is not \[56, 56\] in 2, 4"),
        (packed(4, 24, zeros=True), CT, "weight_zero_point", lambda t: t[1:], r"weight_zero_point: is int32 \[5, 2\]"),
        (packed(4, 24, act_order=True), CT, "weight_g_idx", lambda t: t + 1, "names groups outside 0 to 1"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused(tmp_path, make, quantization, part, change, message):
    path, _ = write(tmp_path, make, quantization, ODD)
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        state(path)
