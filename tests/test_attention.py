"""The ways in which rows look at what is stored: each gives what the others give."""

from functools import partial

import pytest
import torch

from llama.attention import CompiledRows, FixedRows, LayerCache, StepCache, Tiles, choose_backend, short_span
from llama.cache import CacheShape, KVCache, Span
from llama.kernels import library
from llama.rotary import Rotary, rope_frequencies, turning_rates

compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SPANS = [
    Span(0, 1, 40, ((64, 48),)),
    Span(1, 3, 10, ((16, 8), (0, 8))),
    Span(4, 1, 9, ((48, 16),)),
    Span(5, 30, 60, ((160, 32), (112, 48))),
]
FIXED = partial(FixedRows.plan, size=16)


def attended(dtype: torch.dtype, kv_dtype: torch.dtype, window: int | None, plan) -> tuple:
    """A step of four requests over a cache that held earlier tokens of them; and the layer's cache."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(CacheShape(1, 2, 32, window), 192, CPU, kv_dtype)
    before = torch.randn(2, 192, 2, 32, generator=generator).to(dtype)
    for store, rows in zip(cache.layers[0], before, strict=True):
        store.put(torch.arange(192), rows)
    qkv = torch.randn(35, 6 + 2 + 2, 32, generator=generator).to(dtype)
    positions = torch.tensor([position for span in SPANS for position in range(span.start, span.context)])
    rotary = Rotary.at(positions, turning_rates(rope_frequencies(32, 10000.0, None)))
    [layer] = StepCache.of(cache, SPANS, plan)
    return layer.attend(qkv, rotary), layer


@compiled
@pytest.mark.parametrize("short", [1, 8, 64])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.int8), (torch.bfloat16, torch.bfloat16)],
)
def test_short_spans_give_the_same_in_compiled_rows_and_in_tiles(dtype, kv_dtype, window, short):
    rows, _ = attended(dtype, kv_dtype, window, partial(CompiledRows.plan, short=short))
    tiles, _ = attended(dtype, kv_dtype, window, Tiles.plan)
    torch.testing.assert_close(rows, tiles, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_span_is_shorter_where_its_request_is_long():
    spans = [Span(0, rows, context, ((0, context),)) for rows in (16, 17, 64, 65) for context in (4096, 4097)]
    longer = CompiledRows.plan(spans, torch.arange(0), None, short=64).tiles.spans
    assert [(span.num_rows, span.context) for span in longer] == [
        (17, 4097),
        (64, 4097),
        (65, 4096),
        (65, 4097),
    ]


def test_only_where_a_matrix_unit_multiplies_tiles_are_few_rows_short(monkeypatch):
    for has_amx, spans in ((False, [512, 512]), (True, [512, 16])):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=has_amx: {"amx_bf16": known})
        assert [short_span(dtype) for dtype in (torch.float32, torch.bfloat16)] == spans


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_rows_give_the_same_as_tiles(dtype, window):
    fixed, _ = attended(dtype, dtype, window, FIXED)
    tiles, _ = attended(dtype, dtype, window, Tiles.plan)
    torch.testing.assert_close(fixed, tiles, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("plan", [Tiles.plan, FIXED, pytest.param(CompiledRows.plan, marks=compiled)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_and_values_in_8_bits_give_nearly_the_same_attention(dtype, plan):
    if dtype == torch.float16 and plan == CompiledRows.plan:
        pytest.skip("not a type of the compiled operator")
    exact, _ = attended(torch.float32, torch.float32, None, plan)
    rounded, layer = attended(dtype, torch.int8, None, plan)
    assert layer.keys.numbers.dtype == torch.int8
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_each_cache_gets_the_backend_that_serves_it():
    def chosen(dtype: torch.dtype, head_dim: int = 32, fixed_rows: int | None = None) -> type:
        cache = KVCache(CacheShape(1, 2, head_dim), 16, CPU, dtype)
        [layer] = StepCache.of(cache, [], choose_backend(cache, dtype, fixed_rows))
        assert isinstance(layer, LayerCache)
        return type(layer.backend)

    fastest = CompiledRows if library.AVAILABLE else Tiles
    assert chosen(torch.float32) == chosen(torch.bfloat16) == fastest
    assert chosen(torch.float16) == chosen(torch.float32, head_dim=24) == Tiles
    assert chosen(torch.float32, fixed_rows=16) == FixedRows
