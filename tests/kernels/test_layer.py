"""A layer as one operator: what its operators give one after the other, bit for bit, in any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.threads import threads
from support.tiny import tiny_args, tiny_model

from llama.attention import LayerCache, StepCache, choose_backend
from llama.cache import CacheShape, KVCache, Span
from llama.kernels import layer as kernel
from llama.kernels import library
from llama.model import TransformerBlock
from llama.quantization import LowBitLinear
from llama.rotary import Rotary, rope_frequencies, turning_rates

pytestmark = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
SPANS = [Span(0, 1, 40, ((64, 48),)), Span(1, 3, 10, ((16, 8), (0, 8))), Span(4, 40, 50, ((112, 64),))]
CPU = torch.device("cpu")
PLAIN = ""


@pytest.fixture(autouse=True)
def two_threads():
    with threads(2):
        yield


def prepared_layer(
    format: str = "sym_int4", dtype: torch.dtype = torch.float32, bias: bool = False
) -> TransformerBlock:
    biases = dict(attention_bias=bias, attention_output_bias=bias, mlp_bias=bias)
    args = tiny_args(dim=256, n_layers=1, n_heads=8, n_kv_heads=2, hidden_dim=512, **biases)
    [layer] = tiny_model(args).layers
    for owner in (layer.attention, layer.feed_forward):
        for name, linear in list(owner.named_children()):
            if format == PLAIN:
                linear.to(dtype)
            else:
                bias = None if linear.bias is None else linear.bias.data
                setattr(owner, name, LowBitLinear.from_weight(format, linear.weight, bias))
    for product in layer.products:
        product.prepare()
    layer.attention_norm.to(dtype), layer.ffn_norm.to(dtype)
    return layer


@torch.inference_mode()
def computed(layer: TransformerBlock, kv_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """A step of three requests, and what its layer's cache holds then."""
    dtype = layer.ffn_norm.weight.dtype
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(CacheShape(1, 2, 32), 192, CPU, kv_dtype or dtype)
    for store in cache.layers[0]:
        store.put(torch.arange(192), torch.randn(192, 2, 32, generator=generator).to(dtype))
    h = torch.randn(44, 256, generator=generator).to(dtype)
    positions = torch.tensor([position for span in SPANS for position in range(span.start, span.context)])
    rotary = Rotary.at(positions, turning_rates(rope_frequencies(32, 10000.0, None)))
    [one] = StepCache.of(cache, SPANS, choose_backend(cache, dtype))
    before = h.clone()
    out = layer(h, rotary, one)
    assert torch.equal(h, before)
    stored = (one.keys.numbers, one.values.numbers, one.keys.scales, one.values.scales)
    return [out, *(tensor for tensor in stored if tensor is not None)]


def assert_same(these: list[torch.Tensor], those: list[torch.Tensor]) -> None:
    for one, other in zip(these, those, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(torch.float32, None), (torch.float32, torch.int8), (torch.bfloat16, None)]
)
@pytest.mark.parametrize("format", ["sym_int4", "q6_k", PLAIN])
def test_a_layer_at_once_gives_what_its_operators_give(format, dtype, kv_dtype, bias, monkeypatch):
    layer = prepared_layer(format, dtype, bias)
    at_once = computed(layer, kv_dtype)
    monkeypatch.setattr(kernel, "compute_layer", None)
    monkeypatch.setattr(LayerCache, "computes_layers", False)
    assert_same(at_once, computed(layer, kv_dtype))


def test_what_is_added_to_a_product_is_not_forgotten():
    layer = prepared_layer()
    plain, *_ = computed(layer)
    layer.feed_forward.down.added = lambda y, x: y + 1
    torch.testing.assert_close(computed(layer)[0], plain + 1)


def test_a_layer_of_which_a_part_asks_for_another_product_is_computed_by_its_operators():
    layer = prepared_layer()
    whole, *_ = computed(layer)
    layer.feed_forward.w2 = layer.feed_forward.down.joint.prepare(fixed_rows=16)  # asks for one variant
    assert layer.feed_forward.down.for_layer() is None
    assert torch.equal(computed(layer)[0], whole)


def test_any_number_of_threads_gives_the_same_bits():
    layer = prepared_layer()
    expected = computed(layer)
    for number in (1, 3):
        with threads(number):
            assert_same(computed(layer), expected)


def test_several_callers_at_once_get_the_same_bits():
    layer = prepared_layer()
    expected = computed(layer)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: computed(layer), range(40)):
            assert_same(results, expected)
