"""Triton's product with packed weights against the product with dequantized ones: on a GPU, or in the interpreter."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llama import quantization
from llama.quantization import FORMATS, LowBitLinear

pytest.importorskip("triton")

from llama.kernels import cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (4e-3, 4e-2), torch.bfloat16: (2e-2, 3e-1)}
OUTPUTS = 37
SERVED = [name for name, form in FORMATS.items() if form.triton]


def problem(name: str, rows: int, blocks: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x (rows, columns), the packed weight, a bias."""
    generator = torch.Generator().manual_seed(rows)
    columns = blocks * FORMATS[name].block
    packed = FORMATS[name].quantize(torch.randn(OUTPUTS, columns, generator=generator))
    x, bias = (torch.randn(size, generator=generator) for size in ((rows, columns), OUTPUTS))
    return x.to(DEVICE, dtype), packed.to(DEVICE), bias.to(DEVICE)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    rtol, atol = TOLERANCE[x.dtype]
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), F.linear(x.float(), weight, bias), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("name", SERVED)
def test_a_product_is_that_of_the_dequantized_weight(name, rows, dtype):
    if (DEVICE, dtype) == ("cpu", torch.bfloat16) and rows > 1:
        pytest.skip("Triton's interpreter cannot multiply bfloat16 tiles")
    x, packed, bias = problem(name, rows, 1 if name.endswith("_k") else 3, dtype)
    check(cuda.packed_linear(x, packed, bias, name), x, FORMATS[name].dequantize(packed), bias)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["sym_int4", "q6_k"])
def test_columns_are_split_among_programs_and_no_part_is_lost(name, rows, monkeypatch):
    blocks = 2310 // FORMATS[name].block  # the last part is not a full one
    x, packed, bias = problem(name, rows, blocks, torch.float16)
    weight = FORMATS[name].dequantize(packed)
    check(cuda.packed_linear(x, packed, bias, name), x, weight, bias)
    monkeypatch.setattr(cuda, "PROGRAMS", 1)
    check(cuda.packed_linear(x, packed, None, name), x, weight)


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
    columns = cuda.packed_linear(identity, packed, None, name).T
    torch.testing.assert_close(columns, weight, rtol=1e-5, atol=1e-5 * weight.abs().max().item())
    row = cuda.packed_linear(identity[3], packed, None, name)
    torch.testing.assert_close(row, weight[:, 3], rtol=1e-5, atol=1e-5 * weight.abs().max().item())


def test_any_leading_dimensions_strides_and_addresses_are_taken():
    x, packed, bias = problem("q8_0", 12)
    flat = cuda.packed_linear(x, packed, bias, "q8_0")
    shaped = cuda.packed_linear(x.t().contiguous().t().unflatten(0, (3, 4)), packed, bias, "q8_0")
    assert torch.equal(shaped, flat.view(3, 4, OUTPUTS))
    odd = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view_as(packed)
    assert torch.equal(cuda.packed_linear(x, odd, bias, "q8_0"), flat)
    assert cuda.packed_linear(x[:0], packed, bias, "q8_0").shape == (0, OUTPUTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 192, dtype=torch.float64)}, "takes bfloat16, float16 or float32"),
        ({"x": torch.zeros(2, 190)}, "102 bytes of sym_int4 are not 190 columns"),
        ({"x": torch.zeros(2, 128)}, "102 bytes of sym_int4 are not 128 columns"),
        ({"bias": torch.zeros(36)}, "is not for 37 outputs"),
    ],
)
def test_a_call_that_would_read_beyond_its_memory_is_refused(change, message):
    x, packed, bias = problem("sym_int4", 2)
    with pytest.raises(ValueError, match=message):
        cuda.packed_linear(**{"x": x, "packed": packed, "bias": bias, "format": "sym_int4", **change})


def test_the_operator_keeps_torchs_rules():
    x, packed, bias = problem("q4_1", 5)
    torch.library.opcheck(torch.ops.llama.packed_linear.default, (x, packed, bias, "q4_1"))


def test_a_linear_on_a_gpu_is_multiplied_by_triton():
    assert quantization.fastest_product(FORMATS["nf4"], torch.device("cuda")) is quantization.triton_product
    assert quantization.has_kernels("nf4", "cuda")
    x, packed, bias = problem("nf4", 4)
    linear = LowBitLinear.from_packed("nf4", packed, bias)
    linear.product = quantization.triton_product
    check(linear(x), x, linear.dequantize(), bias)
    assert torch.equal(linear.plain(), packed)


def test_without_triton_pytorchs_operators_do_its_work(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert quantization.fastest_product(FORMATS["nf4"], torch.device("cuda")) is quantization.product_in_chunks
    assert not quantization.has_kernels("nf4", "cuda")


def test_with_fixed_rows_a_rows_result_depends_on_no_other_row():
    x, packed, bias = problem("sym_int5", 19, dtype=torch.float16)
    linear = LowBitLinear.from_packed("sym_int5", packed, bias)
    linear.product, linear.fixed_rows = quantization.triton_product, 16
    together = linear(x)
    for place in (0, 7, 15, 16, 18):
        assert torch.equal(together[place], linear(x[place, None])[0])
    check(together, x, linear.dequantize(), bias)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from llama.kernels import cuda

for case in sys.argv[1:]:
    form, dtype, M, N, C = case.split(",")
    fixed = {"M": int(M), "N": int(N), "C": int(C), **cuda.constants(form)}
    types = {"x": f"*{dtype}", "packed": "*u8", "bias": "*fp32", "levels": "*fp32", "y": f"*{dtype}"}
    names = cuda.linear_kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    compile(ASTSource(cuda.linear_kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
"""


def test_the_kernel_compiles_also_where_there_is_no_gpu(monkeypatch):
    """The interpreter takes more of Python than the compiler does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = ("asym_int5,bf16,1,8,16", "nf4,bf16,16,32,2", "q6_k,fp32,16,32,4")  # format, type, M, N, C
    subprocess.run([sys.executable, "-c", COMPILE, *cases], check=True, timeout=300)
