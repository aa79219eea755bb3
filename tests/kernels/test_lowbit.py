"""Compiled low-bit products against their PyTorch twin and against the product with dequantized weights."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.threads import threads

from llama.kernels import library, lowbit
from llama.kernels.lowbit import TILE
from llama.quantization import FORMATS, LowBitLinear

VARIANTS = ["avx512_vnni", "avx2", "scalar", "tiles"]
INTEGER_VARIANTS = VARIANTS[:3]
SERVED = [  # by the compiled kernels
    "sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "zero_int4", "nf4",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k",
]  # fmt: skip
compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def needs(variant: str) -> None:
    if variant not in lowbit.variants():
        pytest.skip(f"this machine cannot run {variant}")


def problem(name: str, rows: int, outputs: int = 37, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x (rows, columns), the plain and the kernel layout, a bias; more blocks than many rows share a decoding of.

    In two rows of three a block stands out, not the same in all of them."""
    form = FORMATS[name]
    columns = 256 + 3 * form.block
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator) * 0.4
    x[::3, form.block + 5], x[1::3, -4:] = 15, -12
    x = x.to(dtype)
    packed = form.quantize(torch.randn(outputs, columns, generator=generator))
    return x, packed, lowbit.to_tiles([packed], form), torch.randn(outputs, generator=generator)


def rounding_bound(x: torch.Tensor, weight: torch.Tensor, group: int) -> torch.Tensor:
    """How far rounding each activation by half a step can move each output."""
    peaks = x.float().unflatten(-1, (-1, group)).abs().amax(dim=-1)
    return (peaks / 254) @ weight.abs().unflatten(-1, (-1, group)).sum(dim=-1).T


@compiled
def test_the_compiled_library_says_which_formats_it_serves():
    assert library.formats() == set(SERVED)


@compiled
@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_layout_is_what_its_twin_makes(name, rows):
    form = FORMATS[name]
    bytes = torch.randint(0, 256, (rows, 9 * form.block_bytes), generator=torch.Generator().manual_seed(rows))
    for packed in (bytes.to(torch.uint8), bytes.to(torch.uint8).T.contiguous().T):
        for parts in ([packed], packed.split(7)):
            assert torch.equal(lowbit.to_tiles(parts, form), lowbit.to_tiles_twin(packed, form))


@compiled
@pytest.mark.parametrize("count", [0, 1, 16, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_are_looked_up_are_what_the_format_says_to_the_last_bit(name, count):
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(count)
    table = torch.randint(0, 256, (70, 5 * form.block_bytes), generator=generator).to(torch.uint8)
    numbers = form.dequantize(table)
    finite = numbers.isfinite().all(dim=-1).nonzero().squeeze(-1)  # scales are random bytes, too
    rows = finite[torch.randint(0, len(finite), (count,), generator=generator)]
    assert torch.equal(lowbit.lowbit_rows(table, rows, form), numbers[rows])


@compiled
@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_in_the_table_is_refused(row):
    table = torch.zeros(3, FORMATS["q8_0"].block_bytes, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"row {row} is not in the table"):
        lowbit.lowbit_rows(table, torch.tensor([0, row]), FORMATS["q8_0"])


@compiled
def test_several_threads_make_the_same_kernel_layout():
    form = FORMATS["sym_int5"]
    packed = torch.arange(50000 * 4 * form.block_bytes).to(torch.uint8).view(50000, -1)  # 8 MB
    torch.set_num_threads(2)
    assert torch.equal(lowbit.to_tiles([packed], form), lowbit.to_tiles_twin(packed, form))


@compiled
def test_rows_that_are_not_whole_blocks_have_no_kernel_layout():
    with pytest.raises(RuntimeError, match="takes uint8 rows of whole blocks"):
        lowbit.to_tiles([torch.zeros(16, 35, dtype=torch.uint8)], FORMATS["q8_0"])


@compiled
@pytest.mark.parametrize("rows", [1, 3, 17, 512])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SERVED)
def test_a_product_is_the_dequantized_weights_within_the_activations_rounding(name, variant, rows):
    needs(variant)
    x, packed, interleaved, bias = problem(name, rows)
    weight = FORMATS[name].dequantize(packed)
    y = lowbit.lowbit_linear(x, interleaved, bias, name, 37, variant)
    bound = rounding_bound(x, weight, FORMATS[name].rounded) + 2e-3
    error = (y - F.linear(x, weight, bias)).abs()
    assert (error <= (bound if variant != "tiles" else 2e-3)).all()


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SERVED)
def test_every_kernel_computes_what_its_twin_defines(name, variant):
    needs(variant)
    x, _, interleaved, bias = problem(name, 11)
    y = lowbit.lowbit_linear(x, interleaved, bias, name, 37, variant)
    twin = lowbit.lowbit_linear_twin(x, interleaved, bias, name, 37, variant)
    # nf4's levels are integers of 15 bits in the kernels
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=2e-3 if name == "nf4" else 1e-4)


@compiled
@pytest.mark.parametrize("rows", [1, 6, 150])
@pytest.mark.parametrize("variant", INTEGER_VARIANTS)
@pytest.mark.parametrize("name", SERVED)
def test_a_block_that_stands_out_adds_hardly_any_error(name, variant, rows):
    needs(variant)
    _, packed, interleaved, _ = problem(name, rows)
    form, weight = FORMATS[name], FORMATS[name].dequantize(packed)
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    x[:, : form.block] *= 1000
    y = lowbit.lowbit_linear(x, interleaved, None, name, 37, variant)
    large, ordinary = (
        rounding_bound(x[:, part], weight[:, part], form.rounded)
        for part in (slice(form.block), slice(form.block, None))
    )
    assert ((y - F.linear(x, weight)).abs() <= ordinary + large / 200 + 0.1).all()
    assert (ordinary + large / 200 + 0.1 < large / 5).all()


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["sym_int4", "q8_0"])
def test_bfloat16_activations_give_bfloat16(name, variant):
    needs(variant)
    x, _, interleaved, bias = problem(name, 9, dtype=torch.bfloat16)
    y = lowbit.lowbit_linear(x, interleaved, bias, name, 37, variant)
    assert y.dtype == torch.bfloat16
    twin = lowbit.lowbit_linear_twin(x.float(), interleaved, bias, name, 37, variant)
    torch.testing.assert_close(y.float(), twin, rtol=0.02, atol=0.15)


@compiled
@pytest.mark.parametrize(("rows", "outputs"), [(23, 37), (23, 70), (150, 37)])
@pytest.mark.parametrize("variant", INTEGER_VARIANTS)
@pytest.mark.parametrize("name", SERVED)
def test_a_rows_result_depends_on_no_other_row(name, variant, rows, outputs):  # three, three and two tiles together
    needs(variant)
    x, _, interleaved, _ = problem(name, rows, outputs)
    together = lowbit.lowbit_linear(x, interleaved, None, name, outputs, variant)
    alone = [lowbit.lowbit_linear(row[None], interleaved, None, name, outputs, variant) for row in x]
    assert torch.equal(together, torch.cat(alone))


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_threads_compute_what_one_does(variant):
    needs(variant)
    form = FORMATS["sym_int5"]
    packed = form.quantize(torch.randn(1100, 256, generator=torch.Generator().manual_seed(0)))
    interleaved = lowbit.to_tiles([packed], form)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))
    one = lowbit.lowbit_linear(x, interleaved, None, "sym_int5", 1100, variant)
    torch.set_num_threads(2)
    torch.testing.assert_close(lowbit.lowbit_linear(x, interleaved, None, "sym_int5", 1100, variant), one)


@compiled
@pytest.mark.parametrize("variant", INTEGER_VARIANTS)
def test_extreme_codes_do_not_overflow(variant):
    needs(variant)
    for name, byte in product(SERVED, (0x00, 0x80, 0xFF)):
        layout = FORMATS[name]
        blocks = torch.full((TILE, layout.block_bytes), byte, dtype=torch.uint8)
        for field, start in ((field, sum(f.size for f in layout.fields[:i])) for i, field in enumerate(layout.fields)):
            if field.name in ("scale", "minimum", "unit", "minimum_unit"):
                one = torch.ones(1, dtype=torch.float32 if field.size == 4 else torch.float16)
                blocks[:, start : start + field.size] = one.view(torch.uint8)
        interleaved = lowbit.to_tiles([blocks], layout)
        for value, rows in product((3.0, -3.0), (1, 16)):  # 16: decoded once for all
            x = torch.full((rows, layout.block), value)
            y = lowbit.lowbit_linear(x, interleaved, None, name, TILE, variant)
            torch.testing.assert_close(y, F.linear(x, layout.dequantize(blocks)), rtol=1e-4, atol=1e-2)


@compiled
@pytest.mark.parametrize("variant", INTEGER_VARIANTS)
def test_zeros_stay_zero_and_what_is_not_a_number_stays_so(variant):
    needs(variant)
    x, _, interleaved, _ = problem("asym_int4", 3)
    x[0], x[1] = 0, 1e-38
    x[2, 5] = float("nan")
    y = lowbit.lowbit_linear(x, interleaved, None, "asym_int4", 37, variant)
    assert (y[:2] == 0).all()
    assert y[2].isnan().all()


@compiled
def test_any_leading_dimensions_and_strides_are_taken():
    x, _, interleaved, bias = problem("q8_0", 12)
    flat = lowbit.lowbit_linear(x, interleaved, bias, "q8_0", 37)
    shaped = lowbit.lowbit_linear(
        x.t().contiguous().t().view(12, -1).unflatten(0, (3, 4)), interleaved, bias, "q8_0", 37
    )
    assert torch.equal(shaped, flat.view(3, 4, 37))
    assert lowbit.lowbit_linear(x[:0], interleaved, bias, "q8_0", 37).shape == (0, 37)


@compiled
def test_the_machines_best_kernel_is_the_default():
    x, _, interleaved, _ = problem("sym_int4", 2)
    default = lowbit.lowbit_linear(x, interleaved, None, "sym_int4", 37)
    assert torch.equal(default, lowbit.lowbit_linear(x, interleaved, None, "sym_int4", 37, lowbit.variants()[0]))


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 192, dtype=torch.float64)}, "takes bfloat16 or float32"),
        ({"x": torch.tensor(1.0)}, "takes rows of numbers"),
        ({"x": torch.zeros(2, 190)}, "not whole blocks"),
        ({"outputs": 49}, "wrong size"),
        ({"bias": torch.zeros(36)}, "bias"),
        ({"format": "int3"}, "no kernel 'scalar' for 'int3'"),
        ({"variant": "sse9"}, "no kernel 'sse9'"),
    ],
)
def test_a_call_that_would_read_beyond_its_memory_is_refused(change, message):
    x, _, interleaved, bias = problem("sym_int4", 2)
    call = {
        "x": x,
        "packed": interleaved,
        "bias": bias,
        "format": "sym_int4",
        "outputs": 37,
        "variant": "scalar",
    }
    with pytest.raises(RuntimeError, match=message):
        lowbit.lowbit_linear(**{**call, **change})


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_torchs_rules(dtype):
    x, _, interleaved, bias = problem("q4_1", 5, dtype=dtype)
    torch.library.opcheck(torch.ops.llama.lowbit_linear.default, (x, interleaved, bias, "q4_1", 37, "auto"))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prepared_linear_agrees_with_the_unprepared_one(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 256, generator=generator), torch.randn(50, generator=generator)
    linear = LowBitLinear.from_weight("q4_k", weight, bias)
    x = torch.randn(2, 3, 256, generator=generator).to(dtype)
    plain = linear(x)
    prepared = linear.prepare()(x)
    assert prepared.shape == (2, 3, 50)
    assert prepared.dtype == dtype
    torch.testing.assert_close(prepared, plain, rtol=0.03, atol=0.3)


@compiled
def test_a_linear_computes_in_the_variant_it_is_told():
    linear = LowBitLinear.from_weight("sym_int8", torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    linear.prepare().variant = "tiles"
    torch.testing.assert_close(linear(x), F.linear(x, linear.dequantize()), rtol=1e-5, atol=1e-5)


def test_without_a_compiled_library_weights_stay_plain(monkeypatch):
    monkeypatch.setattr(library, "AVAILABLE", False)
    linear = LowBitLinear.from_weight("nf4", torch.randn(4, 64)).prepare()
    assert lowbit.variants() == []
    assert linear.weight.shape == (4, 34)


def test_a_library_that_does_not_load_is_named_and_done_without(monkeypatch, tmp_path):
    (tmp_path / "_kernels_broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.warns(UserWarning, match="_kernels_broken.so does not load, PyTorch operators do its work"):
        assert not library.load_library()


def test_the_twin_rounds_activations_to_255_steps():
    form = replace(FORMATS["q4_0"], block=4)
    x = torch.tensor([[127.0, 63.4, -63.6, 0.2], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(lowbit.round_activations(x, form), torch.tensor([[127.0, 63, -64, 0], [0, 0, 0, 0]]))


def test_the_twin_rounds_a_block_twice_where_its_peak_is_above_twice_the_mean():
    form = replace(FORMATS["q4_0"], block=2)
    rounded = lowbit.round_activations(torch.tensor([[127.0, 0.3, 12.7, 0.02, 0.0, 12.7]]), form)
    assert torch.equal(rounded[0, [0, 2, 3, 4, 5]], torch.tensor([127.0, 12.7, 0, 0, 12.7]))
    assert rounded[0, 1] == pytest.approx(0.3, rel=1e-6)
    even = lowbit.round_activations(torch.tensor([[127.0, 0.3, 63.5, 0.2, 63.5, 0.0]]), form)
    assert even[0, 1] == 0
