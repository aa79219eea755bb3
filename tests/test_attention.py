"""Attention of single rows: the compiled kernel against its twin, and keys and values in 8 bits."""

import pytest
import torch

from llama.cache import CacheShape, KVCache, LayerCache, Span
from llama.kernels import library
from llama.kernels.attention import attend_rows, attend_rows_twin, row_table, store_rows

compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
VARIANTS = ["avx512_vnni", "avx2", "scalar"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def needs(variant: str) -> None:
    if variant not in library.instruction_sets():
        pytest.skip(f"this machine cannot run {variant}")


def problem(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, int8: bool, slots: int = 900):
    """q of four rows; keys and values; their scales or None."""
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(4, heads, head_dim, generator=generator).to(dtype)
    size = (kv_heads, slots, head_dim)
    if not int8:
        return (q, *(torch.randn(size, generator=generator).to(dtype) for _ in range(2)), None, None)
    codes = [torch.randint(-127, 128, size, generator=generator).to(torch.int8) for _ in range(2)]
    scales = [torch.rand(size[:2], generator=generator) / 50 for _ in range(2)]
    return (q, *codes, *scales)


TABLE = row_table([(2, [(5, 1)]), (0, [(880, 20), (16, 300), (400, 7)]), (3, [(0, 512)])])


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 128), (14, 2, 48)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_attend_as_their_twin_defines(variant, heads, kv_heads, head_dim, dtype, int8):
    needs(variant)
    stored = problem(heads, kv_heads, head_dim, dtype, int8)
    out, expected = torch.zeros_like(stored[0]), torch.zeros_like(stored[0])
    attend_rows(*stored, TABLE, out, variant)
    attend_rows_twin(*stored, TABLE, expected)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out[1] == 0).all()  # the table does not name it


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rows_bits_depend_neither_on_the_other_rows_nor_on_where_its_runs_lie(variant):
    needs(variant)
    q, keys, values, *_ = problem(8, 2, 64, torch.float32, False)
    together, alone, moved = (torch.zeros_like(q) for _ in range(3))
    attend_rows(
        q, keys, values, None, None, row_table([(1, [(0, 300)]), (3, [(300, 600)])]), together, variant
    )
    attend_rows(q, keys, values, None, None, row_table([(3, [(300, 600)])]), alone, variant)
    assert torch.equal(together[3], alone[3])
    order = torch.cat([torch.arange(500, 900), torch.arange(500)])  # slots 300-499 now at 700, 500-899 at 0
    table = row_table([(3, [(700, 200), (0, 400)])])
    attend_rows(
        q, keys[:, order].contiguous(), values[:, order].contiguous(), None, None, table, moved, variant
    )
    assert torch.equal(moved[3], alone[3])


@compiled
def test_several_threads_attend_as_one_does():
    stored = problem(8, 2, 64, torch.float32, False)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.zeros_like(stored[0]))
        attend_rows(*stored, TABLE, results[-1])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_huge_scores_neither_overflow_nor_lose_what_is_not_a_number(variant):
    needs(variant)
    q, keys, values, *_ = problem(2, 1, 16, torch.float32, False)
    q[0] *= 1e18
    q[1] = float("nan")
    out = torch.zeros_like(q)
    attend_rows(q, keys, values, None, None, row_table([(0, [(0, 50)]), (1, [(0, 50)])]), out, variant)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@compiled
@pytest.mark.parametrize(
    "table",
    [[0], [0, 1, 5], [0, 0], [4, 1, 0, 1], [-1, 1, 0, 1], [0, 1, 899, 2], [0, 1, -1, 2], [0, 1, 0, 0]],
)
def test_a_table_that_leaves_the_memory_is_refused(table):
    stored = problem(4, 4, 16, torch.float32, False)
    with pytest.raises(RuntimeError, match="attend_rows"):
        attend_rows(*stored, torch.tensor(table), torch.zeros_like(stored[0]))


@compiled
@pytest.mark.parametrize("int8", [False, True])
def test_the_operator_keeps_torchs_rules(int8):
    stored = problem(4, 2, 16, torch.float32, int8)
    arguments = (*stored, TABLE, torch.zeros_like(stored[0]), "auto")
    torch.library.opcheck(torch.ops.llama.attend_rows.default, arguments)


def stored_rows(dtype: torch.dtype, int8: bool):
    """Five rows to store, among them zeros and what is not a number; their slots; a cache's numbers and scales."""
    rows = torch.randn(5, 4, 48, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1:]
    rows[1, 2], rows[3, 1, 7] = 0, float("nan")
    numbers = torch.zeros(3, 20, 48, dtype=torch.int8 if int8 else dtype)
    return rows, torch.tensor([7, 0, 19, 3, 4]), numbers, torch.zeros(3, 20) if int8 else None


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_stored_as_pytorchs_operators_do(dtype, int8, monkeypatch):
    rows, slots, *cache = stored_rows(dtype, int8)
    _, _, *expected = stored_rows(dtype, int8)
    store_rows(rows, slots, *cache)
    monkeypatch.setattr(library, "serves", lambda *_: False)
    store_rows(rows, slots, *expected)
    if not int8:
        assert torch.equal(cache[0].view(torch.uint8), expected[0].view(torch.uint8))
        return
    torch.testing.assert_close(cache[1], expected[1], rtol=0, atol=0, equal_nan=True)
    finite = expected[1].isfinite()
    assert not finite.all()
    assert torch.equal(cache[0][finite], expected[0][finite])


@compiled
@pytest.mark.parametrize("slot", [-1, 20])
def test_a_slot_outside_the_cache_is_refused(slot):
    rows, slots, *cache = stored_rows(torch.float32, False)
    slots[2] = slot
    with pytest.raises(RuntimeError, match="outside the cache"):
        store_rows(rows, slots, *cache)


@compiled
@pytest.mark.parametrize("int8", [False, True])
def test_storing_keeps_torchs_rules(int8):
    torch.library.opcheck(torch.ops.llama.store_rows.default, stored_rows(torch.float32, int8))


SPANS = [Span(0, 1, 40, ((64, 48),)), Span(1, 3, 10, ((16, 8), (0, 8))), Span(4, 1, 9, ((48, 16),))]


def attended(dtype: torch.dtype, kv_dtype: torch.dtype, window: int | None = None, fixed: int | None = None):
    """A step of three requests over a cache that held earlier tokens of them; and the layer's cache."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(CacheShape(1, 2, 32, window), 128, torch.device("cpu"), kv_dtype, fixed)
    [layer] = cache.layers([Span(0, 128, 128, ((0, 128),))])
    before = torch.randn(2, 128, 2, 32, generator=generator).to(dtype)
    for store, rows in zip((layer.keys, layer.values), before, strict=True):
        store.put(layer.slots, rows)
    [layer] = cache.layers(SPANS)
    q, k, v = (torch.randn(5, heads, 32, generator=generator).to(dtype) for heads in (6, 2, 2))
    return layer.attend(q, k, v), layer


@compiled
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_the_cache_gives_the_same_with_the_kernel_and_without(kv_dtype, window, monkeypatch):
    with_kernel, _ = attended(torch.float32, kv_dtype, window)
    monkeypatch.setattr("llama.cache.serves", lambda q: False)
    without, _ = attended(torch.float32, kv_dtype, window)
    torch.testing.assert_close(with_kernel, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fixed", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_and_values_in_8_bits_give_nearly_the_same_attention(dtype, fixed):
    exact, _ = attended(torch.float32, torch.float32, fixed=fixed)
    rounded, layer = attended(dtype, torch.int8, fixed=fixed)
    assert layer.keys.numbers.dtype == torch.int8
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_a_stored_row_is_rounded_to_255_steps_of_its_largest_magnitude():
    cache = KVCache(CacheShape(1, 1, 4), 3, torch.device("cpu"), torch.int8)
    [layer] = cache.layers([Span(0, 3, 3, ((0, 3),))])
    layer.keys.put(
        layer.slots, torch.tensor([[[127.0, 63.4, -63.6, 0.2]], [[0.0, 0, 0, 0]], [[1e-40, 0, 0, 0]]])
    )
    stored = layer.keys.run((0, 3), torch.float32)
    assert torch.equal(stored[0, 0], torch.tensor([127.0, 63, -64, 0]))
    assert (stored[0, 1:].abs() <= 1e-40).all()


def test_blocks_are_copied_with_their_scales():
    _, layer = attended(torch.float32, torch.int8)
    cache = KVCache(CacheShape(1, 2, 32), 128, torch.device("cpu"), torch.int8)
    cache.keys.layers()[0].put(layer.slots, torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(1)))
    slot = int(layer.slots[1])
    cache.copy(slot, 96, 1)
    copied = cache.keys.layers()[0]
    assert torch.equal(copied.run((96, 1), torch.float32), copied.run((slot, 1), torch.float32))


def test_8_bits_cost_one_scale_a_token_and_head():
    shape = CacheShape(3, 2, 64)
    assert shape.bytes_per_token(torch.int8) == 2 * 3 * 2 * (64 + 4)
    assert shape.bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 128


def test_types_and_sizes_that_the_kernel_does_not_take_are_left_to_pytorch():
    assert library.serves(torch.zeros(1, 2, 32)) == library.AVAILABLE
    assert not library.serves(torch.zeros(1, 2, 24))
    assert not library.serves(torch.zeros(1, 2, 32, dtype=torch.float16))
    assert not library.serves(torch.zeros(1, 2, 32, device="meta"))
    assert isinstance(attended(torch.float16, torch.float16)[1], LayerCache)
