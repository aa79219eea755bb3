"""What the cache stores, and where."""

import pytest
import torch
from support.tiny import tiny_args, tiny_model

from llama import runner
from llama.cache import CacheShape, ContiguousCache, KVCache, Span, Store, clip, first_seen
from llama.runner import count_blocks

CPU = torch.device("cpu")


def filled(store: Store, seed: int = 0) -> torch.Tensor:
    """Random rows in every slot of a store: what it gives back for all of them."""
    heads, slots, head_dim = store.numbers.shape
    rows = torch.randn(slots, heads, head_dim, generator=torch.Generator().manual_seed(seed))
    store.put(torch.arange(slots), rows.to(store.numbers.dtype) if store.scales is None else rows)
    return store.run((0, slots), torch.float32).clone()


def test_every_layer_has_tensors_of_its_own():
    cache = KVCache(CacheShape(3, 2, 32), 8, CPU, torch.float32)
    storages = {store.numbers.untyped_storage().data_ptr() for layer in cache.layers for store in layer}
    assert len(storages) == 6
    assert all(store.numbers.shape == (2, 8, 32) for layer in cache.layers for store in layer)


def test_a_spans_tokens_go_to_the_last_slots_of_its_context():
    cache = KVCache(CacheShape(1, 1, 4), 128, CPU, torch.float32)
    spans = [Span(0, 3, 10, ((64, 8), (16, 2))), Span(3, 1, 1, ((0, 16),))]
    assert cache.slots(spans).tolist() == [71, 16, 17, 0]
    assert cache.slots([]).dtype == torch.int64


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_sees_what_stands_before_it_within_the_window(window):
    span = Span(4, 3, 10, ((64, 8), (16, 2)))
    everything = [[(64, 8)], [(64, 8), (16, 1)], [(64, 8), (16, 2)]]
    last_three = [[(69, 3)], [(70, 2), (16, 1)], [(71, 1), (16, 2)]]
    assert list(span.seen(window)) == (everything if window is None else last_three)


def test_what_each_row_sees_is_what_clipping_its_extents_gives():
    extents = ((40, 3), (10, 1), (90, 7), (20, 4), (60, 16))
    for window in (None, 1, 2, 5, 8, 100):
        for context in range(1, 32):
            for num_rows in {1, 2, context}:
                span = Span(0, min(num_rows, context), context, extents)
                positions = range(span.start, context)
                clipped = [list(clip(extents, first_seen(at, window), at + 1)) for at in positions]
                assert list(span.seen(window)) == clipped


def test_a_stored_row_is_rounded_to_255_steps_of_its_largest_magnitude():
    store = Store.empty((1, 3, 4), CPU, torch.int8)
    store.put(torch.arange(3), torch.tensor([[[127.0, 63.4, -63.6, 0.2]], [[0.0, 0, 0, 0]], [[1e-40, 0, 0, 0]]]))
    stored = store.run((0, 3), torch.float32)
    assert torch.equal(stored[0, 0], torch.tensor([127.0, 63, -64, 0]))
    assert (stored[0, 1:].abs() <= 1e-40).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_blocks_are_copied_in_every_layer_with_their_scales(dtype):
    cache = KVCache(CacheShape(2, 2, 32), 64, CPU, dtype)
    stores = [store for layer in cache.layers for store in layer]
    before = [filled(store, seed) for seed, store in enumerate(stores)]
    cache.copy(8, 48, 16)
    for store, rows in zip(stores, before, strict=True):
        rows[:, 48:] = rows[:, 8:24]
        assert torch.equal(store.run((0, 64), torch.float32), rows)


def test_a_contiguous_cache_keeps_its_rows_when_it_grows():
    cache = ContiguousCache(CacheShape(2, 2, 16), 3, CPU, torch.float32)
    cache.reserve(10)
    assert cache.capacity == 64
    before = [filled(store).unflatten(1, (3, 64)) for layer in cache.layers for store in layer]
    cache.reserve(65)
    assert cache.capacity == 128
    stores = [store for layer in cache.layers for store in layer]
    for store, rows in zip(stores, before, strict=True):
        assert torch.equal(store.run((0, 384), torch.float32).unflatten(1, (3, 128))[:, :, :64], rows)


def test_8_bits_cost_one_scale_a_token_and_head():
    shape = CacheShape(3, 2, 64)
    assert shape.bytes_per_token(torch.int8) == 2 * 3 * 2 * (64 + 4)
    assert shape.bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 128


def test_ranks_on_one_machine_divide_its_memory_among_their_caches(monkeypatch):
    model = tiny_model(tiny_args(max_batch_size=1000))
    monkeypatch.setattr(runner, "free_memory", lambda device: 8 << 20)
    alone = count_blocks(model, None, torch.float32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_blocks(model, None, torch.float32) == alone // 4
    assert count_blocks(model, 4 << 20, torch.float32) == alone, "what was asked for is each rank's"
