"""Triton's attention over what the cache stores against PyTorch's: on a GPU, or in the interpreter."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.attention import Paged, StepCache, Tiles
from llama.cache import CacheShape, KVCache, Span
from llama.rotary import Rotary, rope_frequencies, turning_rates

pytest.importorskip("triton")

from llama.kernels.cuda import attention as gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies with NumPy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SPANS = [
    Span(0, 1, 40, ((64, 48),)),
    Span(1, 3, 18, ((16, 16), (0, 16))),
    Span(4, 1, 1, ((48, 16),)),
    Span(5, 30, 60, ((160, 32), (112, 48))),
    Span(35, 1, 90, ((192, 96),)),
]
NUM_SLOTS = 288


def attended(
    plan, dtype, kv_dtype=None, window=None, heads=6, kv_heads=2, head_dim=32, spans=SPANS, num_slots=NUM_SLOTS
) -> tuple[torch.Tensor, KVCache]:
    """What a step of `spans` gives over a cache that holds earlier tokens of theirs, and the cache behind it."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(CacheShape(1, kv_heads, head_dim, window), num_slots, DEVICE, kv_dtype or dtype)
    before = torch.randn(2, num_slots, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    for store, rows in zip(cache.layers[0], before, strict=True):
        store.put(torch.arange(num_slots, device=DEVICE), rows)
    positions = [position for span in spans for position in range(span.start, span.context)]
    qkv = torch.randn(len(positions), heads + 2 * kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    rates = turning_rates(rope_frequencies(head_dim, 10000.0, None, DEVICE))
    rotary = Rotary.at(torch.tensor(positions, device=DEVICE), rates)
    [layer] = StepCache.of(cache, spans, plan)
    return layer.attend(qkv, rotary), cache


def check(**case) -> None:
    group = case.get("heads", 6) // case.get("kv_heads", 2)
    paged, stored = attended(partial(Paged.plan, group=group), **case)
    tiles, wanted = attended(Tiles.plan, **case)
    tolerance = dict.fromkeys(("rtol", "atol"), TOLERANCE[case["dtype"]] * (1 if case.get("kv_dtype") is None else 4))
    assert paged.dtype == tiles.dtype
    torch.testing.assert_close(paged, tiles, **tolerance)
    for own, other in zip(stored.layers[0], wanted.layers[0], strict=True):
        if own.scales is None:
            torch.testing.assert_close(own.numbers, other.numbers, **tolerance)
        else:  # a number that lies between two steps may become either
            torch.testing.assert_close(own.scales, other.scales, rtol=1e-2, atol=0)
            assert (own.numbers.int() - other.numbers.int()).abs().max() <= 1


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_rows_give_what_tiles_give(dtype, is_int8, window):
    check(dtype=dtype, kv_dtype=torch.int8 if is_int8 else None, window=window)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 1, 100), (9, 3, 64), (40, 1, 20), (2, 2, 8)]
)
def test_any_number_of_heads_of_any_size(heads, kv_heads, head_dim):
    check(dtype=torch.float32, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


@pytest.mark.parametrize("window", [None, 200])
def test_a_long_context_is_cut_into_pieces_and_joined(window, monkeypatch):
    monkeypatch.setattr(gpu, "TOKENS_OF_PIECE", 64)
    spans = [Span(0, 1, 500, ((0, 512),)), Span(1, 4, 130, ((512, 144),)), Span(5, 1, 3, ((656, 16),))]
    assert gpu.cut(500, 6) == (8, 64)
    check(dtype=torch.float32, window=window, spans=spans, num_slots=672)


def test_a_row_without_a_slot_is_not_stored_and_a_tile_without_rows_writes_nothing():
    spans = [Span(0, 1, 5, ((0, 16),)), Span(1, 1, 9, ((16, 16),))]
    cache = KVCache(CacheShape(1, 2, 32), NUM_SLOTS, DEVICE, torch.float32)
    for store in cache.layers[0]:
        store.numbers.fill_(7)
    qkv = torch.randn(2, 10, 32, device=DEVICE)
    rotary = Rotary.at(torch.tensor([4, 8], device=DEVICE), torch.zeros(32, device=DEVICE))
    plan = Paged.plan(spans, torch.tensor([4, -1], device=DEVICE), None)
    plan.short.tiles[1, 1:3] = 0
    keys, values = cache.layers[0]
    stored = (keys.numbers, values.numbers, None, None)
    q = gpu.store_rotated(qkv, rotary.cos, rotary.sin, plan.slots, *stored)
    out = torch.full_like(q, 3)
    gpu.attend(q, *stored, plan.short, plan.runs, None, out)
    assert (out[0] != 3).all()
    assert (out[1] == 3).all()
    for store in cache.layers[0]:
        assert (store.numbers[:, 4] != 7).all()
        store.numbers[:, 4] = 7
        assert (store.numbers == 7).all()


def test_extents_are_whole_runs():
    with pytest.raises(ValueError, match="are not whole runs of 16 tokens"):
        gpu.run_table([[(0, 8), (16, 8)]])
    assert gpu.run_table([[(0, 32), (64, 5)], [(48, 3)]]).tolist() == [[0, 16, 64], [48, 0, 0]]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=5), st.sampled_from([None, 9]))
@settings(max_examples=10, deadline=None)
def test_whatever_spans_a_step_has_all_rows_see_their_own(sizes, window):
    spans, row, slot = [], 0, 0
    for num_rows, before in sizes:
        context = num_rows + before
        length = -(-context // 16) * 16
        spans.append(Span(row, num_rows, context, ((slot, length),)))
        row, slot = row + num_rows, slot + length
    check(dtype=torch.float32, window=window, spans=spans, num_slots=slot)
