"""Rotating, storing and attending: the compiled operator against its twin."""

import pytest
import torch
from support.threads import threads

from llama.kernels import library
from llama.kernels.attention import attend_rows, attend_rows_twin, row_table, store_rows
from llama.kernels.dense import dense_linear
from llama.kernels.elementwise import rotate_twin
from llama.rotary import Rotary, rope_frequencies, turning_rates

compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
VARIANTS = ["avx512_vnni", "avx2", "scalar"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def needs(variant: str) -> None:
    if variant not in library.instruction_sets():
        pytest.skip(f"this machine cannot run {variant}")


def angles(positions: list[int], head_dim: int) -> Rotary:
    return Rotary.at(torch.tensor(positions), turning_rates(rope_frequencies(head_dim, 10000.0, None)))


def problem(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, int8: bool, tokens: int = 4):
    """A step's qkv, cos, sin, slots; keys and values of 900 slots, and their scales or None."""
    generator = torch.Generator().manual_seed(heads)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    rotary = angles([5, 880, 40, 3, *range(4, tokens)], head_dim)
    others = [slot for slot in range(100, 897) if slot != 450]  # no slot twice: threads would race for it
    slots = torch.tensor([7, 899, 0, 450, *others[: tokens - 4]])
    step = (qkv, rotary.cos, rotary.sin, slots)
    size = (kv_heads, 900, head_dim)
    if not int8:
        return (*step, *(torch.randn(size, generator=generator).to(dtype) for _ in range(2)), None, None)
    codes = [torch.randint(-127, 128, size, generator=generator).to(torch.int8) for _ in range(2)]
    scales = [torch.rand(size[:2], generator=generator) / 50 for _ in range(2)]
    return (*step, *codes, *scales)


TABLE = row_table([(2, [(5, 1)]), (0, [(880, 20), (16, 300), (400, 7)]), (3, [(0, 512)])])


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 128), (14, 2, 48)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_attend_as_their_twin_defines(variant, heads, kv_heads, head_dim, dtype, int8):
    needs(variant)
    arguments = problem(heads, kv_heads, head_dim, dtype, int8)
    out = attend_rows(*arguments, TABLE, variant)
    expected = attend_rows_twin(*problem(heads, kv_heads, head_dim, dtype, int8), TABLE)
    named = [0, 2, 3]
    torch.testing.assert_close(out[named], expected[named], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rows_bits_depend_neither_on_the_other_rows_nor_on_where_its_runs_lie(variant):
    needs(variant)
    *step, slots, keys, values, _, _ = problem(8, 2, 64, torch.float32, False)

    def attended(slots, keys, values, table):
        stored = (keys.clone(), values.clone(), None, None)
        return attend_rows(*step, slots, *stored, row_table(table), variant)[3]

    together = attended(slots, keys, values, [(1, [(0, 300)]), (3, [(300, 600)])])
    alone = attended(slots, keys, values, [(3, [(300, 600)])])
    assert torch.equal(together, alone)
    order = torch.cat([torch.arange(500, 900), torch.arange(500)])  # slots 300-499 now at 700, 500-899 at 0
    moved = (slots + 400) % 900, keys[:, order].contiguous(), values[:, order].contiguous()
    assert torch.equal(attended(*moved, [(3, [(700, 200), (0, 400)])]), alone)


def growing(first_row: int, *lengths: int, runs: list[tuple[int, int]]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Rows that see so many of the runs' tokens."""
    table = []
    for row, length in enumerate(lengths, first_row):
        seen = []
        for slot, most in runs:
            if length > 0:
                seen.append((slot, min(most, length)))
            length -= most
        table.append((row, seen))
    return table


# tables of which some rows are computed together, and some look as if they could be
TOGETHER = {
    "one request": growing(0, *range(246, 264), runs=[(500, 250), (10, 100)]),
    "equal rows": growing(0, 300, 300, 300, runs=[(0, 300)]),
    "a shared prefix": [(row, [(100, 270), (400 + 20 * row, 3 + row)]) for row in range(5)],
    "a window": [(row, [(200 + row, 40)]) for row in range(6)],
    "nearly the same": [(0, [(0, 5), (9, 5)]), (1, [(0, 6), (9, 5)]), (2, [(0, 6), (9, 7)]), (3, [(0, 6), (8, 9)])],
    "shorter again": growing(0, 17, 18, 16, 20, runs=[(30, 30)]),
}


@compiled
@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 48), (9, 3, 64), (8, 2, 32), (12, 1, 16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_beside_others_has_the_bits_that_it_has_alone(variant, heads, kv_heads, head_dim, dtype, int8, case):
    needs(variant)
    table, tokens = TOGETHER[case], 18
    arguments = problem(heads, kv_heads, head_dim, dtype, int8, tokens)
    together = attend_rows(*arguments, row_table(table), variant)[: len(table)]
    expected = attend_rows_twin(*problem(heads, kv_heads, head_dim, dtype, int8, tokens), row_table(table))
    torch.testing.assert_close(together, expected[: len(table)], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for row in table:
        alone = attend_rows(*arguments, row_table([row]), variant)
        assert torch.equal(together[row[0]], alone[row[0]])


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_notice_what_is_no_number_behind_it(variant):
    needs(variant)
    arguments = problem(9, 3, 64, torch.float32, False)
    table = growing(0, 40, 41, 42, 43, runs=[(500, 50)])
    for stored in arguments[4:6]:
        stored[:, 542:] = float("nan")
    out = attend_rows(*arguments, row_table(table), variant)
    assert out[:3].isfinite().all()
    assert out[3].isnan().all()


@compiled
@pytest.mark.parametrize("rows", [1, 100])  # the second product is the library's: torch's threads are the helpers then
@pytest.mark.parametrize("tokens", [4, 700])
def test_several_threads_store_and_attend_as_one_does(tokens, rows):
    results = []
    for number in (1, 2):
        with threads(number):
            dense_linear(torch.ones(rows, 16), torch.ones(16, 16), None)
            arguments = problem(8, 2, 64, torch.float32, False, tokens)
            results.append((attend_rows(*arguments, TABLE)[[0, 2, 3]], *arguments[4:6]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_huge_scores_neither_overflow_nor_lose_what_is_not_a_number(variant):
    needs(variant)
    qkv, *others = problem(2, 1, 16, torch.float32, False)
    qkv[0, :2] *= 1e18
    qkv[1, :2] = float("nan")
    out = attend_rows(qkv, *others, row_table([(0, [(0, 50)]), (1, [(0, 50)])]), variant)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@compiled
@pytest.mark.parametrize(
    "table",
    [
        [0],
        [0, 1, 5],
        [0, 0],
        [4, 1, 0, 1],
        [-1, 1, 0, 1],
        [0, 1, 899, 2],
        [0, 1, -1, 2],
        [0, 1, 0, 0],
        [0, 2**62, 0, 1],
    ],
)
def test_a_table_that_leaves_the_memory_is_refused(table):
    refuses("attend_rows", table=torch.tensor(table))


@compiled
@pytest.mark.parametrize("slots", [[0, 1, -1, 2], [0, 1, 900, 2], [0, 1, 2]])
def test_slots_outside_the_cache_or_too_few_are_refused(slots):
    refuses("slot", slots=torch.tensor(slots))


@compiled
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda x: x[:, :8], "do not fit key heads"),
        ("qkv", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "side by side"),
        ("qkv", torch.Tensor.double, "takes bfloat16 or float32"),
        ("cos", lambda x: x[:3], "cos and sin"),
        ("keys", lambda x: x[..., :8], "not laid out"),
        ("values", torch.Tensor.bfloat16, "of that type or int8"),
        ("key_scale", lambda _: torch.ones(4, 900), "other types none"),
    ],
)
def test_what_does_not_fit_together_is_refused(name, change, message):
    refuses(message, **{name: change(named(problem(4, 4, 16, torch.float32, False))[name])})


def named(arguments: tuple) -> dict:
    names = ("qkv", "cos", "sin", "slots", "keys", "values", "key_scale", "value_scale")
    return dict(zip(names, arguments, strict=True))


def refuses(message: str, **changed: torch.Tensor) -> None:
    """attend_rows raises and stores nothing where one argument of a good call is another."""
    good = named(problem(4, 4, 16, torch.float32, False))
    before = good["keys"].clone(), good["values"].clone()
    with pytest.raises(RuntimeError, match=message):
        attend_rows(**{**good, "table": TABLE} | changed)
    assert torch.equal(good["keys"], before[0])
    assert torch.equal(good["values"], before[1])


@compiled
@pytest.mark.parametrize("int8", [False, True])
def test_the_operator_keeps_torchs_rules(int8):
    table = row_table([(row, [(0, 30)]) for row in range(4)])
    arguments = (*problem(4, 2, 16, torch.float32, int8), table, "auto")
    torch.library.opcheck(torch.ops.llama.attend_rows.default, arguments)


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_stored_to_the_bit_as_pytorchs_operators_do(variant, dtype, int8):
    needs(variant)
    qkv, cos, sin, slots, *stored = problem(4, 2, 48, dtype, int8)
    _, k, v = qkv.split_with_sizes((4, 2, 2), dim=1)
    k[1, 1], v[2, 0], v[3, 1, 7] = 0, 0, float("nan")
    expected = [None if tensor is None else tensor.clone() for tensor in stored]
    attend_rows(qkv, torch.ones_like(cos), torch.zeros_like(sin), slots, *stored, row_table(()), variant)
    for rows, numbers, scales in zip((k, v), expected[:2], expected[2:], strict=True):
        store_rows(rows, slots, numbers, scales)
    assert not (stored[3] if int8 else stored[1]).isfinite().all()
    for numbers, scales, expected_numbers, expected_scales in zip(
        stored[:2], stored[2:], expected[:2], expected[2:], strict=True
    ):
        finite = torch.ones(2, 900, dtype=torch.bool)
        if int8:
            torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
            finite = scales.isfinite()
        assert torch.equal(numbers[finite].view(torch.uint8), expected_numbers[finite].view(torch.uint8))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_are_turned_before_they_are_stored_and_values_are_not(variant, dtype):
    needs(variant)
    qkv, cos, sin, slots, keys, values, *scales = problem(4, 2, 48, dtype, False)
    attend_rows(qkv, cos, sin, slots, keys, values, *scales, row_table(()), variant)
    tolerance = TOLERANCE[dtype] / 10  # PyTorch multiplies and adds in two roundings
    expected = rotate_twin(qkv[:, 4:6], cos, sin).transpose(0, 1)
    torch.testing.assert_close(keys[:, slots], expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(values[:, slots], qkv[:, 6:].transpose(0, 1))


def test_types_and_sizes_that_the_kernel_does_not_take_are_left_to_pytorch():
    assert library.serves(torch.zeros(1, 2, 32)) == library.AVAILABLE
    assert not library.serves(torch.zeros(1, 2, 24))
    assert not library.serves(torch.zeros(1, 2, 32, dtype=torch.float16))
    assert not library.serves(torch.zeros(1, 2, 32, device="meta"))
