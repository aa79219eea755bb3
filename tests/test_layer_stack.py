"""All layers in one operator: what they give one by one, bit for bit, and never with weights that are there no more."""

import copy
import gc
import weakref

import pytest
import torch
from support.tiny import tiny_args, tiny_model
from torch import nn

from llama.attention import StepCache, choose_backend
from llama.cache import KVCache, Span
from llama.kernels import library
from llama.kernels.lowrank import Factors
from llama.layer_stack import LayerStack
from llama.lora import LowRankChange, Site
from llama.model import Transformer, TransformerBlock
from llama.quantization import LowBitLinear

pytestmark = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
SPANS = [Span(0, 1, 40, ((64, 48),)), Span(1, 3, 10, ((16, 8), (0, 8)))]
PLAIN = ""


def prepared(format: str = PLAIN, dtype: torch.dtype = torch.float32, fixed_rows: int | None = None) -> Transformer:
    model = tiny_model(tiny_args(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=256)).to(dtype)
    if format:
        for layer in model.layers:
            for owner in (layer.attention, layer.feed_forward):
                for name, linear in list(owner.named_children()):
                    setattr(owner, name, LowBitLinear.from_weight(format, linear.weight, None))
    model.prepare(fixed_rows)
    return model


@torch.inference_mode()
def computed(model: Transformer, kv_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The states of a step of two requests, and what all layers' caches hold then."""
    dtype = model.norm.weight.dtype
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(model.cache_shape, 128, torch.device("cpu"), kv_dtype or dtype)
    for pair in cache.layers:
        for store in pair:
            store.put(torch.arange(128), torch.randn(128, 2, 32, generator=generator).to(dtype))
    positions = torch.tensor([position for span in SPANS for position in range(span.start, span.context)])
    caches = StepCache.of(cache, SPANS, choose_backend(cache, dtype, model.fixed_rows))
    states = model.hidden_states(torch.tensor([5, 9, 2, 7]), positions, caches)
    stored = (tensor for pair in cache.layers for store in pair for tensor in (store.numbers, store.scales))
    return [states, *(tensor for tensor in stored if tensor is not None)]


def one_by_one(model: Transformer, kv_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerStack, "kept", lambda self: None)
        return computed(model, kv_dtype)


def is_at_once(model: Transformer) -> bool:
    """Whether a step calls no layer."""
    called = []
    forward = TransformerBlock.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerBlock, "forward", lambda *given: called.append(True) or forward(*given))
        computed(model)
    return not called


def assert_same(these: list[torch.Tensor], those: list[torch.Tensor]) -> None:
    for one, other in zip(these, those, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(torch.float32, None), (torch.float32, torch.int8), (torch.bfloat16, None)]
)
@pytest.mark.parametrize("format", ["sym_int4", PLAIN])
def test_all_layers_at_once_give_what_they_give_one_by_one(format, dtype, kv_dtype):
    if dtype == torch.bfloat16 and not format and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("plain weights are in the matrix library's order here")
    model = prepared(format, dtype)
    assert is_at_once(model)
    assert_same(computed(model, kv_dtype), one_by_one(model, kv_dtype))


def test_what_is_added_to_a_product_is_added_as_long_as_it_is_there():
    model = prepared("sym_int4")
    before = computed(model)
    model.layers[1].feed_forward.down.added = lambda y, x: y + 1
    assert not is_at_once(model)
    assert not torch.equal(computed(model)[0], before[0])
    model.layers[1].feed_forward.down.added = None
    assert is_at_once(model)
    assert_same(computed(model), before)


def test_an_adapter_that_no_row_of_the_step_asks_for_costs_nothing():
    model, change = (
        prepared("sym_int4"),
        LowRankChange(Factors.of([(torch.ones(2, 256), torch.ones(128, 2))], [0]), None),
    )
    before = computed(model)
    model.layers[1].feed_forward.down.added = site = Site()
    site.changes[1] = [change]
    assert is_at_once(model)
    site.rows.runs = ((1, 1), (0, 3))
    assert not is_at_once(model)
    changed = computed(model)[0]
    assert not torch.equal(changed[0], before[0][0])
    assert torch.equal(changed[1:], before[0][1:])


@pytest.mark.parametrize("place", ["layers.2.attention_norm", "layers.1.feed_forward.w2"])
def test_a_weight_that_took_another_ones_place_is_the_one_that_is_used(place):
    model = prepared()
    before = computed(model)
    module = model.get_submodule(place)
    module.weight = nn.Parameter(module.weight * 2, requires_grad=False)
    assert not torch.equal(computed(model)[0], before[0])
    assert_same(computed(model), one_by_one(model))


def test_packed_weights_that_are_loaded_later_are_those_that_are_used():
    model, other = prepared("sym_int4"), prepared("sym_int4")
    before = computed(model)
    other.layers[0].feed_forward.w2.weight.bitwise_xor_(1)
    model.layers[0].feed_forward.w2.load_state_dict(other.layers[0].feed_forward.w2.state_dict())
    assert not torch.equal(computed(model)[0], before[0])
    assert_same(computed(model), one_by_one(model))


def test_a_layer_that_somebody_looks_at_is_called():
    model, seen = prepared(), []
    handle = model.layers[1].register_forward_hook(lambda layer, given, result: seen.append(result))
    computed(model)
    assert [one.shape for one in seen] == [(4, 128)]
    handle.remove()
    assert is_at_once(model)


def test_layers_that_fix_their_number_of_rows_are_called():
    assert not is_at_once(prepared(fixed_rows=16))


def test_what_is_kept_is_gathered_again_only_when_something_was_set():
    model = prepared()
    computed(model)
    kept = model.stack.kept()
    computed(model)
    assert model.stack.kept() is kept
    model.norm.eps = model.norm.eps
    assert model.stack.kept() is not kept


def test_weights_that_were_moved_are_those_that_are_used():
    model = prepared("sym_int4")
    before = computed(model)
    model.layers[0].feed_forward._apply(torch.clone)
    model.layers[0].feed_forward.w2.weight.bitwise_xor_(1)
    assert not torch.equal(computed(model)[0], before[0])
    assert_same(computed(model), one_by_one(model))


def test_a_copy_of_a_model_has_weights_and_a_cache_of_its_own():
    model = prepared()
    model.forward(torch.tensor([[5, 9, 2]]), 0)
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        for layer in copied.layers:
            layer.attention_norm.weight.zero_()
            layer.ffn_norm.weight.zero_()
    assert not torch.equal(copied.forward(torch.tensor([[7]]), 3), model.forward(torch.tensor([[7]]), 3))
    stored = [store.numbers[:, :4] for pair in model._cache.layers for store in pair]
    before = [numbers.clone() for numbers in stored]
    copied.forward(torch.tensor([[8, 8]]), 1)
    assert_same(stored, before)


def test_what_is_kept_goes_with_its_owner():
    model = prepared()
    weight = weakref.ref(model.layers[0].feed_forward.w1.weight)
    computed(model)
    number = model.stack.kept().number
    del model
    gc.collect()
    assert weight() is None
    cache = KVCache(tiny_model(tiny_args()).cache_shape, 16, torch.device("cpu"), torch.float32)
    h, cos = torch.ones(1, 128), torch.ones(1, 1, 32)
    with pytest.raises(RuntimeError, match=f"nothing is kept under the number {number}"):
        torch.ops.llama.compute_layers(h, number, cache.kept.number, cos, cos, torch.tensor([0]), torch.tensor([0]))
