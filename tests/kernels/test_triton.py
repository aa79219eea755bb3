"""Triton's product with packed weights against the product with dequantized ones: on a GPU, or in the interpreter."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llama import quantization
from llama.quantization import FORMATS, LowBitLinear

pytest.importorskip("triton")

from llama.kernels.cuda import lowbit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (4e-3, 4e-2), torch.bfloat16: (2e-2, 3e-1)}
OUTPUTS = 37
SERVED = [name for name, form in FORMATS.items() if form.triton]


def problem(name: str, rows: int, blocks: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x (rows, columns), the packed weight in the published layout, a bias."""
    generator = torch.Generator().manual_seed(rows)
    columns = blocks * FORMATS[name].block
    packed = FORMATS[name].quantize(torch.randn(OUTPUTS, columns, generator=generator))
    x, bias = (torch.randn(size, generator=generator) for size in ((rows, columns), OUTPUTS))
    return x.to(DEVICE, dtype), packed.to(DEVICE), bias.to(DEVICE)


def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, name: str) -> torch.Tensor:
    return lowbit.packed_linear(x, lowbit.to_words([packed], FORMATS[name]), bias, name)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    rtol, atol = TOLERANCE[x.dtype]
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), F.linear(x.float(), weight, bias), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 17, lowbit.FEW + 1])
@pytest.mark.parametrize("name", SERVED)
def test_a_product_is_that_of_the_dequantized_weight(name, rows, dtype):
    if (DEVICE, dtype) == ("cpu", torch.bfloat16) and rows > 1:
        pytest.skip("Triton's interpreter cannot multiply bfloat16 tiles")
    x, packed, bias = problem(name, rows, 1 if name.endswith("_k") else 3, dtype)
    check(product(x, packed, bias, name), x, FORMATS[name].dequantize(packed), bias)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["sym_int4", "q6_k"])
def test_columns_are_split_among_programs_and_no_part_is_lost(name, rows, monkeypatch):
    blocks = 2310 // FORMATS[name].block  # the last part is not a full one
    x, packed, bias = problem(name, rows, blocks, torch.float16)
    weight = FORMATS[name].dequantize(packed)
    check(product(x, packed, bias, name), x, weight, bias)
    monkeypatch.setattr(lowbit, "PROGRAMS", 1)
    monkeypatch.setattr(lowbit, "SMALL_PROGRAMS", 1)
    check(product(x, packed, None, name), x, weight)


@pytest.mark.parametrize("name", ["sym_int8", "q5_1", "q6_k", "q4_k"])
def test_any_bytes_mean_what_the_layout_says(name):
    layout = FORMATS[name]
    packed = torch.randint(0, 256, (OUTPUTS, layout.block_bytes), generator=torch.Generator().manual_seed(0))
    packed = packed.to(torch.uint8)
    for field, end in ((field, sum(f.size for f in layout.fields[: i + 1])) for i, field in enumerate(layout.fields)):
        if field.name in ("scale", "minimum", "unit", "minimum_unit"):
            packed[:, end - 1] = packed[:, end - 1] & 0x83 | 0x38  # an ordinary exponent
    packed = packed.to(DEVICE)
    weight = layout.dequantize(packed)
    identity = torch.eye(layout.block, device=DEVICE)
    columns = product(identity, packed, None, name).T
    torch.testing.assert_close(columns, weight, rtol=1e-5, atol=1e-5 * weight.abs().max().item())
    row = product(identity[3], packed, None, name)
    torch.testing.assert_close(row, weight[:, 3], rtol=1e-5, atol=1e-5 * weight.abs().max().item())


def test_any_leading_dimensions_and_strides_are_taken():
    x, packed, bias = problem("q8_0", 12)
    flat = product(x, packed, bias, "q8_0")
    shaped = product(x.t().contiguous().t().unflatten(0, (3, 4)), packed, bias, "q8_0")
    assert torch.equal(shaped, flat.view(3, 4, OUTPUTS))
    assert product(x[:0], packed, bias, "q8_0").shape == (0, OUTPUTS)


@pytest.mark.parametrize("name", SERVED)
def test_planes_are_the_same_bytes_in_another_order(name):
    _, packed, _ = problem(name, 2)
    form = FORMATS[name]
    arranged = lowbit.to_words([packed[:9], packed[9:]], form)
    assert arranged.shape == packed.shape
    assert not torch.equal(arranged, packed)
    assert torch.equal(arranged.flatten().sort().values, packed.flatten().sort().values)
    assert torch.equal(lowbit.from_words(arranged, form), packed)
    assert torch.equal(lowbit.from_words(arranged, form, slice(5, 11)), packed[5:11])


def test_a_large_weight_is_unpacked_piece_by_piece(monkeypatch):
    x, packed, bias = problem("q4_0", lowbit.FEW + 1)
    whole = product(x, packed, bias, "q4_0")
    monkeypatch.setattr(lowbit, "MOST_UNPACKED", 10 * x.shape[1])
    torch.testing.assert_close(product(x, packed, bias, "q4_0"), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 192, dtype=torch.float64)}, "takes bfloat16, float16 or float32"),
        ({"x": torch.zeros(2, 190)}, "102 bytes of sym_int4 are not 190 columns"),
        ({"x": torch.zeros(2, 128)}, "102 bytes of sym_int4 are not 128 columns"),
        ({"bias": torch.zeros(36)}, "is not for 37 outputs"),
        ({"packed": torch.zeros(102, 37, dtype=torch.uint8).t()}, "is contiguous"),
    ],
)
def test_a_call_that_would_read_beyond_its_memory_is_refused(change, message):
    x, packed, bias = problem("sym_int4", 2)
    with pytest.raises(ValueError, match=message):
        lowbit.packed_linear(**{"x": x, "packed": packed, "bias": bias, "format": "sym_int4", **change})


def test_the_operator_keeps_torchs_rules():
    x, packed, bias = problem("q4_1", 5)
    planes = lowbit.to_words([packed], FORMATS["q4_1"])
    torch.library.opcheck(torch.ops.llama.packed_linear.default, (x, planes, bias, "q4_1"))


def test_a_linear_on_a_gpu_is_multiplied_by_triton(monkeypatch):
    assert quantization.fastest_product(FORMATS["nf4"], torch.device("cuda")) is quantization.triton_product
    assert quantization.has_kernels("nf4", "cuda")
    x, packed, bias = problem("nf4", 4)
    monkeypatch.setattr(quantization, "fastest_product", lambda form, device: quantization.triton_product)
    linear = LowBitLinear.from_packed("nf4", packed, bias).prepare()
    assert not torch.equal(linear.weight, packed)
    check(linear(x), x, linear.dequantize(), bias)
    assert torch.equal(linear.plain(), packed)


def test_without_triton_pytorchs_operators_do_its_work(monkeypatch):
    monkeypatch.setattr(quantization, "has_triton", lambda: False)
    assert quantization.fastest_product(FORMATS["nf4"], torch.device("cuda")) is quantization.product_in_chunks
    assert not quantization.has_kernels("nf4", "cuda")


def test_with_fixed_rows_a_rows_result_depends_on_no_other_row(monkeypatch):
    x, packed, bias = problem("sym_int5", 19, dtype=torch.float16)
    monkeypatch.setattr(quantization, "fastest_product", lambda form, device: quantization.triton_product)
    linear = LowBitLinear.from_packed("sym_int5", packed, bias).prepare(fixed_rows=16)
    together = linear(x)
    for place in (0, 7, 15, 16, 18):
        assert torch.equal(together[place], linear(x[place, None])[0])
    check(together, x, linear.dequantize(), bias)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from llama.kernels.cuda import lowbit

for case in sys.argv[1:]:
    kernel, form, dtype, M, N, C = case.split(",")
    kernel, layout = getattr(lowbit, kernel), lowbit.FORMATS[form]
    fixed = {"M": int(M), "N": int(N), "C": int(C), "STAGES": 2, **lowbit.constants(form)}
    names = [field.name for field in layout.fields]
    fixed |= {name: None for name in ("highs", "minimums", "zeros", "steps", "levels")}
    types = {"words": "*i32", "scales": "*fp16", "bias": "*fp32", "x": f"*{dtype}", "y": f"*{dtype}"}
    for field, name, type in (
        ("high", "highs", "*i16"), ("minimum", "minimums", "*fp16"), ("minimum_unit", "minimums", "*fp16"),
        ("zero", "zeros", "*u8"), ("scales", "steps", "*u8"),
    ):
        if field in names:
            types[name] = type if (field, layout.bits) != ("high", 6) else "*i32"
            fixed.pop(name)
    if layout.levels:
        types["levels"] = "*fp32"
        fixed.pop("levels")
    arguments = kernel.arg_names
    fixed = {name: value for name, value in fixed.items() if name in arguments}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in arguments}
    compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
"""


def test_the_kernels_compile_also_where_there_is_no_gpu(monkeypatch):
    """The interpreter takes more of Python than the compiler does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = (  # kernel, format, type, M, N, C
        "row_kernel,asym_int5,bf16,1,8,32", "row_kernel,q4_k,bf16,1,8,16", "rows_kernel,nf4,bf16,16,32,8",
        "rows_kernel,q6_k,fp32,16,32,8", "unpack_kernel,zero_int4,fp16,1,8,16",
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", COMPILE, *cases], check=True, timeout=300)
