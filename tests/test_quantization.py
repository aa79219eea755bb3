"""Low-bit formats: bytes equal to slow transcriptions of the published quantizers, and the linear that holds them."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threads import threads

from llama.kernels import library, lowbit
from llama.kernels.bits import halves, pack_bits, unpack_bits
from llama.kernels.formats import NF4_LEVELS, NF4_MIDDLES, Field, Groups, LowBitFormat
from llama.quantization import (
    FORMATS,
    LowBitError,
    LowBitLinear,
    has_kernels,
    resolve_format,
)

GGML = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k"]
K_FORMATS = ["q4_k", "q6_k"]
BIGDL_TYPES = {"sym_int4": 2, "asym_int4": 3, "sym_int5": 6, "asym_int5": 7, "sym_int8": 8, "nf4": 10}
SIMPLE = [
    *BIGDL_TYPES,
    "zero_int4",
    *(name for name in GGML if name not in K_FORMATS),
]  # by a published formula
MOST_ERROR = {4: 0.1, 5: 0.05, 6: 0.025, 8: 0.01}  # of random weights, by the bits of a code
BLOCK_BYTES = {
    "sym_int4": 34, "asym_int4": 36, "sym_int5": 42, "asym_int5": 44, "sym_int8": 68, "nf4": 34,
    "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "q4_k": 144, "q6_k": 210,
    "zero_int4": 35,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


class Signs(LowBitFormat):
    """One bit a weight, its sign, and the mean magnitude of eight."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().mean(-1, keepdim=True).half()
        return self.join(scale=scale, codes=pack_bits((x > 0).to(torch.uint8)))

    def unpack(self, blocks: torch.Tensor) -> Groups:
        parts = self.cut(blocks)
        return Groups(2 * unpack_bits(parts["codes"]).unsqueeze(1), halves(parts["scale"]).unsqueeze(-1))


@pytest.fixture
def signs(monkeypatch) -> LowBitFormat:
    """A format that nothing was compiled for."""
    fields = Field("scale", 2, 2), Field("codes", 1, 1)
    form = Signs("signs", block=8, group=8, bits=1, offset=1, fields=fields)
    monkeypatch.setitem(FORMATS, "signs", form)
    return form


def sample_blocks(block: int, count: int = 4096) -> torch.Tensor:
    """Random blocks of every size down to the smallest float32, all-zero ones, and the nf4 levels' middles."""
    blocks = torch.randn(count, block, generator=torch.Generator().manual_seed(0))
    for i, exponent in enumerate(range(0, -46, -1)):
        blocks[i * 40 : (i + 1) * 40] *= 10.0**exponent
    blocks[-40:] = 0
    blocks[-80:-40] = blocks[-80:-40].round()  # equal magnitudes of both signs
    middles = torch.tensor(NF4_MIDDLES).repeat(18)[:block]
    blocks[-81], blocks[-81, 0] = middles, 1.0
    blocks[-82], blocks[-82, 0] = middles.nextafter(torch.tensor(2.0)), -1.0
    blocks[-83] = torch.arange(block) + 0.5  # halves
    blocks[-83, 0] = 127.0
    return blocks


def slow_affine(x: np.ndarray, bits: int, with_minimum: bool) -> bytes:
    """One block, as ggml and BigDL-LLM pack it."""
    one = np.float32(1)
    if with_minimum:
        low, highest = x.min(), 2**bits - 1
        scale = (x.max() - low) / np.float32(highest)
        shifted, rounding = x - low, np.float32(0.5)
    else:
        half = 2 ** (bits - 1)
        peak = next(value for value in x if abs(value) == np.abs(x).max())
        scale, highest = peak / np.float32(-half), 2 * half - 1
        shifted, rounding = x, np.float32(half + 0.5)
    inverse = one / scale if scale else np.float32(0)
    codes = [0 if not np.isfinite(v) else min(highest, int(v)) for v in shifted * inverse + rounding]
    out = np.float16(scale).tobytes() + (np.float16(low).tobytes() if with_minimum else b"")
    if bits == 5:
        out += sum((code >> 4) << j for j, code in enumerate(codes)).to_bytes(len(codes) // 8, "little")
    k = len(codes) // 2
    return out + bytes(codes[j] & 15 | (codes[j + k] & 15) << 4 for j in range(k))


def slow_int8(x: np.ndarray, scale_type: type) -> bytes:
    scale = np.abs(x).max() / np.float32(127)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    codes = []
    for value in x * inverse:
        whole = np.floor(abs(value)) if np.isfinite(value) else np.float32(0)
        up = np.isfinite(value) and abs(value) - whole >= np.float32(0.5)
        codes.append(int(np.copysign(whole + up, value)) & 255)
    return scale_type(scale).tobytes() + bytes(codes)


def slow_zero_int4(x: np.ndarray) -> bytes:
    low, half = min(x.min(), np.float32(0)), np.float32(0.5)
    scale = np.float16((max(x.max(), np.float32(0)) - low) / np.float32(15))
    inverse = np.float32(1) / np.float32(scale) if scale else np.float32(0)
    zero = min(15, int(-low * inverse + half))
    codes = [max(0, min(15, int(value))) for value in x * inverse + np.float32(zero) + half]
    return scale.tobytes() + bytes([zero, *(codes[j] | codes[j + 32] << 4 for j in range(32))])


def slow_nf4(x: np.ndarray) -> bytes:
    peak = np.abs(x).max()
    middles = np.array(NF4_MIDDLES, np.float32)
    codes = [int((value > middles).sum()) for value in x / peak] if peak else [0] * 64
    return np.float16(peak).tobytes() + bytes(codes[j] << 4 | codes[j + 32] for j in range(32))


def slow_quantize(name: str, x: np.ndarray) -> bytes:
    if name == "nf4":
        return slow_nf4(x)
    if name == "zero_int4":
        return slow_zero_int4(x)
    if name in ("sym_int8", "q8_0"):
        return slow_int8(x, np.float32 if name == "sym_int8" else np.float16)
    return slow_affine(x, 5 if "5" in name else 4, name.startswith("asym") or name.endswith("_1"))


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # reciprocals of tiny scales overflow: that is the point
def test_bytes_equal_a_slow_transcription_of_the_published_formula(name):
    blocks = sample_blocks(FORMATS[name].block)
    expected = b"".join(slow_quantize(name, block) for block in blocks.numpy())
    packed = FORMATS[name].quantize(blocks.view(64, -1))
    assert packed.shape == (64, 64 * BLOCK_BYTES[name])
    assert packed.numpy().tobytes() == expected


@pytest.mark.parametrize("name", GGML)
def test_ggml_formats_equal_the_gguf_package(name):
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType[name.upper()]
    form = FORMATS[name]
    x = sample_blocks(form.block)[40:1360]  # its reciprocals of the very smallest scales are undefined
    packed = form.quantize(x.reshape(40, -1))
    if name not in K_FORMATS:
        x = x.reshape(40, -1)
        np.testing.assert_array_equal(packed.numpy(), quants.quantize(x.numpy(), kind))
    np.testing.assert_array_equal(form.dequantize(packed).numpy(), quants.dequantize(packed.numpy(), kind))


@pytest.mark.parametrize("name", GGML)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scales that are not numbers
def test_any_ggml_bytes_dequantize_as_in_the_gguf_package(name):
    quants = pytest.importorskip("gguf.quants")
    form = FORMATS[name]
    packed = torch.randint(0, 256, (8, 4 * form.block_bytes), generator=torch.Generator().manual_seed(1))
    packed = packed.to(torch.uint8)
    expected = quants.dequantize(packed.numpy(), quants.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(form.dequantize(packed).numpy(), expected)


@pytest.mark.parametrize("name", BIGDL_TYPES)
def test_bytes_equal_bigdl_llm_where_it_is_installed(name):
    spec = importlib.util.find_spec("bigdl")
    found = [lib for root in (spec.submodule_search_locations if spec else []) for lib in Path(root).rglob("*_avx2.so")]
    library = next((str(path) for path in found if path.name == "libllama_avx2.so"), None)
    if library is None:
        pytest.skip("bigdl-llm is not installed")
    blocks = sample_blocks(64).numpy()
    out, histogram = np.zeros((4096, BLOCK_BYTES[name]), np.uint8), np.zeros(64, np.int64)
    quantize = ctypes.CDLL(library).ggml_quantize_tensor
    quantize.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    quantize(blocks.ctypes.data, out.ctypes.data, BIGDL_TYPES[name], blocks.size, 64, histogram.ctypes.data)
    np.testing.assert_array_equal(FORMATS[name].quantize(torch.from_numpy(blocks)).numpy(), out)


@pytest.mark.parametrize("name", SIMPLE)
def test_dequantization_is_bit_equal_to_the_formula(name):
    form = FORMATS[name]
    packed = form.quantize(sample_blocks(form.block, 256 + 2048))[::8]
    for block, numbers in zip(packed.numpy(), form.dequantize(packed).numpy(), strict=True):
        half, wide = block[: len(block) // 2 * 2].view(np.float16), form.block // 2
        scale = block[:4].view(np.float32)[0] if name == "sym_int8" else np.float32(half[0])
        if name in ("sym_int8", "q8_0"):
            expected = block[-form.block :].view(np.int8).astype(np.float32) * scale
        else:
            nibbles = block[-wide:]
            codes = np.concatenate([nibbles & 15, nibbles >> 4]).astype(np.float32)
            if name == "nf4":
                levels = np.array(NF4_LEVELS, np.float32)
                codes = levels[np.concatenate([nibbles >> 4, nibbles & 15])]
            elif "5" in name:
                high = np.unpackbits(block[-wide - form.block // 8 : -wide], bitorder="little")
                codes = codes + 16 * high.astype(np.float32)
            with_minimum = name.startswith("asym") or name.endswith("_1")
            offset = 0 if with_minimum or name == "nf4" else 16 if "5" in name else 8
            if name == "zero_int4":
                offset = block[2]
            expected = (codes - np.float32(offset)) * scale
            if with_minimum:
                expected = expected + np.float32(half[1])
        assert expected.tobytes() == numbers.tobytes()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_dequantized_quantizes_to_nearly_itself(name):
    form = FORMATS[name]
    weight = torch.randn(6, 2 * max(form.block, 256), generator=torch.Generator().manual_seed(2))
    error = (form.dequantize(form.quantize(weight)) - weight).norm() / weight.norm()
    assert error < MOST_ERROR[form.bits]


@pytest.mark.parametrize("name", K_FORMATS)
def test_k_formats_keep_every_weight_within_a_step_of_its_group(name):
    form = FORMATS[name]
    x = sample_blocks(256)[:120]
    x[::3] += 1  # one-sided groups
    group = form.group
    wide = x.unflatten(-1, (-1, group)).abs().amax(dim=-1, keepdim=True)
    error = (form.dequantize(form.quantize(x)) - x).unflatten(-1, (-1, group)).abs()
    largest = wide.amax(dim=1, keepdim=True)  # six- or eight-bit scales are steps of the largest
    step, scale_step = (1 / 15, 1 / 40) if name == "q4_k" else (1 / 30, 1 / 100)
    assert (error <= wide * step + largest * scale_step).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_says_what_a_weight_costs(name):
    form = FORMATS[name]
    assert form.block_bytes == BLOCK_BYTES[name]
    assert form.bits_per_weight == 8 * BLOCK_BYTES[name] / form.block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_packed_as_their_float32_values(dtype):
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(FORMATS["sym_int4"].quantize(weight), FORMATS["sym_int4"].quantize(weight.float()))


def test_zero_is_one_of_zero_int4s_numbers():
    form = FORMATS["zero_int4"]
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
    weight[10:20], weight[20:30], weight[30:] = weight[10:20].abs() + 1, -weight[20:30].abs() - 1, 0
    weight[:, ::3] = 0
    assert (form.dequantize(form.quantize(weight))[:, ::3] == 0).all()
    assert (form.dequantize(form.quantize(weight))[30:] == 0).all()


def test_one_block_at_an_odd_byte_is_read():
    form = FORMATS["zero_int4"]
    packed = form.quantize(torch.randn(3, 64, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(form.dequantize(packed[1:2]), form.dequantize(packed)[1:2])


def test_large_weights_are_converted_in_parts_without_a_seam():
    weight = torch.randn(70, 16384, generator=torch.Generator().manual_seed(4))  # more than one chunk of rows
    form = FORMATS["asym_int5"]
    packed = form.quantize(weight)
    assert torch.equal(packed[64:], form.quantize(weight[64:]))
    assert torch.equal(form.dequantize(packed)[64:], form.dequantize(packed[64:]))


def test_columns_that_are_not_whole_blocks_are_refused_with_formats_that_fit():
    with pytest.raises(LowBitError, match=r"packs 64 columns.*96 columns are not a multiple; choose q4_0, q4_1"):
        FORMATS["sym_int4"].quantize(torch.zeros(2, 96))
    with pytest.raises(LowBitError, match="choose no low-bit format"):
        FORMATS["q4_k"].quantize(torch.zeros(2, 100))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_numbers_that_no_scale_can_hold_are_refused(bad):
    weight = torch.zeros(2, 64)
    weight[1, 3] = bad
    with pytest.raises(LowBitError, match="finite numbers up to 65504"):
        FORMATS["sym_int4"].quantize(weight)


@pytest.mark.parametrize("name", ["sym_int4", "zero_int4", "q6_k"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_ranks_parts_are_the_parts_of_the_numbers(name, dim):
    form = FORMATS[name]
    weight = torch.randn(8, 4 * form.block, generator=torch.Generator().manual_seed(5))
    packed = form.quantize(weight)
    parts = [form.split(packed, dim, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim), packed)
    for part, numbers in zip(parts, form.dequantize(packed).chunk(4, dim), strict=True):
        assert torch.equal(form.dequantize(part), numbers)


def test_a_split_that_cuts_a_block_is_refused_with_the_sizes_that_work():
    packed = FORMATS["sym_int4"].quantize(torch.zeros(6, 6 * 64))
    with pytest.raises(LowBitError, match=r"6 blocks of 64 columns.*among 4 ranks; use one of 1, 2, 3, 6"):
        FORMATS["sym_int4"].split(packed, 1, 0, 4)
    with pytest.raises(LowBitError, match=r"6 rows do not divide among 4 ranks"):
        FORMATS["sym_int4"].split(packed, 0, 0, 4)


def test_every_spelling_names_the_same_format():
    assert resolve_format() is None
    assert resolve_format("Q4_0") == "q4_0"
    assert resolve_format(load_in_4bit=True) == "sym_int4"
    assert resolve_format(load_in_8bit=True) == "sym_int8"
    assert resolve_format(load_in_low_bit="nf4") == "nf4"
    assert resolve_format("sym_int4", load_in_4bit=True, load_in_low_bit="sym_int4") == "sym_int4"


def test_unknown_and_contradicting_formats_are_refused():
    with pytest.raises(LowBitError, match=r"unknown quantization 'int3'; choose one of sym_int4, asym_int4"):
        resolve_format("int3")
    with pytest.raises(LowBitError, match="asked for sym_int4 and sym_int8 at once"):
        resolve_format(load_in_4bit=True, load_in_8bit=True)


def make_linear(name: str, rows: int = 21, blocks: int = 3, bias: bool = False, seed: int = 0) -> LowBitLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * FORMATS[name].block, generator=generator)
    return LowBitLinear.from_weight(name, weight, torch.randn(rows, generator=generator) if bias else None)


@pytest.mark.parametrize("name", FORMATS)
def test_without_kernels_the_product_is_the_dequantized_weights(name):
    linear = make_linear(name, bias=True)
    x = torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, linear.dequantize(), linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x.bfloat16()).float(), expected, rtol=0.02, atol=0.3)


@pytest.mark.parametrize("name", FORMATS)
def test_preparing_saving_and_loading_never_change_a_byte(name):
    linear = make_linear(name, bias=True)
    packed = linear.weight.clone()
    linear.prepare().prepare()
    assert torch.equal(linear.plain(), packed)
    state = linear.state_dict()
    assert torch.equal(state["weight"], packed)

    other = LowBitLinear(name, linear.in_features, linear.out_features, bias=True).prepare()
    other.load_state_dict(state)
    assert torch.equal(other.prepare().state_dict()["weight"], packed)
    assert torch.equal(other.bias, linear.bias)


def test_a_weight_has_one_layout_in_memory():
    linear = make_linear("q5_1", rows=32)
    num_bytes = linear.weight.numel()
    linear.prepare()
    assert [(name, buffer.numel()) for name, buffer in linear.named_buffers()] == [("weight", num_bytes)]


@pytest.mark.parametrize("compiled", [False, True])
def test_joined_linears_give_their_outputs_side_by_side(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(library, "formats", frozenset)
    parts = [make_linear("asym_int4", rows, bias=True, seed=rows) for rows in (5, 16, 7)]
    x = torch.randn(4, parts[0].in_features, generator=torch.Generator().manual_seed(1))
    joined = LowBitLinear.join(parts)
    assert torch.equal(joined.plain(), torch.cat([part.plain() for part in parts]))
    joined.prepare()
    parts = [part.prepare() for part in parts]
    assert torch.equal(LowBitLinear.join(parts).plain(), joined.plain())
    torch.testing.assert_close(joined(x), torch.cat([part(x) for part in parts], dim=-1))


def test_linears_that_differ_cannot_be_joined():
    with pytest.raises(LowBitError, match="must agree in format, input width"):
        LowBitLinear.join([make_linear("sym_int4"), make_linear("nf4")])
    with pytest.raises(LowBitError, match="must agree"):
        LowBitLinear.join([make_linear("sym_int4"), make_linear("sym_int4", bias=True)])


def test_a_packed_weight_of_an_impossible_shape_is_refused():
    with pytest.raises(LowBitError, match=r"sym_int4 needs uint8 \(rows, a multiple of 34 bytes\), not .*\(4, 35\)"):
        LowBitLinear.from_packed("sym_int4", torch.zeros(4, 35, dtype=torch.uint8))


def test_a_low_bit_linear_prints_what_it_is():
    assert repr(make_linear("nf4")) == "LowBitLinear(nf4, in_features=192, out_features=21)"


def test_a_new_format_is_a_class_and_a_row_and_works_without_a_kernel(signs):
    weight = torch.tensor([[1.0, -1, 1, 1, -1, 1, -3, 3] * 3, [0.5] * 24])
    linears = [LowBitLinear.from_weight("signs", part) for part in (weight, -weight)]
    assert linears[0].dequantize()[0, :8].tolist() == [1.5, -1.5, 1.5, 1.5, -1.5, 1.5, -1.5, 1.5]
    joint = LowBitLinear.join(linears).prepare()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([torch.nn.functional.linear(x, linear.dequantize()) for linear in linears], dim=-1)
    torch.testing.assert_close(joint(x), expected)
    assert not has_kernels("signs", "cpu")
    assert not has_kernels("signs", "cuda")
    assert resolve_format("signs") == "signs"


def test_with_fixed_rows_a_format_without_a_kernel_gives_each_row_the_same_bits(signs):
    linear = LowBitLinear.from_weight("signs", torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    linear.prepare(fixed_rows=4)
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_any_bytes_survive_the_kernel_layout(name, rows, blocks, seed):
    layout = FORMATS[name]
    packed = torch.randint(0, 256, (rows, blocks * layout.block_bytes), generator=torch.Generator().manual_seed(seed))
    packed = packed.to(torch.uint8)
    restored = lowbit.from_tiles(lowbit.to_tiles_twin(packed, layout), layout, rows, blocks * layout.block)
    assert torch.equal(restored, packed)
