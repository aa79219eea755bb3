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
from llama.lora import ColumnChange, LowRankChange, Site, StepRows
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
        patch.setattr(LayerStack, "plan", lambda self, num_rows: None)
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


def low_rank(outputs: int, columns: int, seed: int = 0, place: int = 0) -> LowRankChange:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, columns, generator=generator), torch.randn(outputs, 4, generator=generator)
    return LowRankChange(Factors.of([(a, b / 64)], [place]), None)


def adapted(model: Transformer, changes: dict[str, dict[int, list]]) -> StepRows:
    """Adapters' changes at some joints of layer 1, and what says whose the rows are."""
    rows = StepRows()
    for name, by_adapter in changes.items():
        site = Site()
        site.rows, site.changes = rows, by_adapter
        owner, attribute = name.split(".")
        getattr(getattr(model.layers[1], owner), attribute).added = site
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["sym_int4", PLAIN])
def test_what_adapters_of_low_rank_add_is_added_in_the_same_call(format, dtype):
    model = prepared(format, dtype)
    before = computed(model)
    one, other = low_rank(256, 128), low_rank(128, 256, seed=1)
    rows = adapted(
        model,
        {
            "attention.qkv": {1: [one], 2: [low_rank(64, 128, seed=2, place=128)]},
            "feed_forward.gate_up": {2: [one, low_rank(256, 128, seed=3, place=256)]},
            "feed_forward.down": {1: [other]},
        },
    )
    assert is_at_once(model)
    assert_same(computed(model), before)
    for runs in [((1, 4),), ((1, 1), (0, 3)), ((0, 1), (2, 3)), ((2, 1), (1, 3)), ((1, 4),)]:
        rows.runs = runs
        assert is_at_once(model)
        assert_same(computed(model), one_by_one(model))
        assert not torch.equal(computed(model)[0], before[0])
    rows.runs = ()
    assert_same(computed(model), before)


def test_changes_that_the_operator_does_not_know_are_made_one_by_one():
    model = prepared("sym_int4")
    rows = adapted(model, {"feed_forward.down": {1: [ColumnChange(torch.full((128,), 2.0)), low_rank(128, 256)]}})
    assert is_at_once(model)
    rows.runs = ((1, 4),)
    assert not is_at_once(model)
    assert_same(computed(model), one_by_one(model))


def test_what_an_adapter_added_goes_with_it():
    model = prepared("sym_int4")
    change = low_rank(128, 256)
    factors = weakref.ref(change.factors.numbers)
    rows = adapted(model, {"feed_forward.down": {1: [change], 2: [low_rank(128, 256, seed=1)]}})
    rows.runs = ((1, 4),)
    computed(model)
    del change
    rows.runs = ((2, 4),)
    model.layers[1].feed_forward.down.added.remove(1)
    computed(model)
    gc.collect()
    assert factors() is None


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
    plan = model.stack.plan(4)
    computed(model)
    assert model.stack.plan(4) is plan
    model.norm.eps = model.norm.eps
    assert model.stack.plan(4) is not plan


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
    number = model.stack.plan(4).layers.number
    del model
    gc.collect()
    assert weight() is None
    cache = KVCache(tiny_model(tiny_args()).cache_shape, 16, torch.device("cpu"), torch.float32)
    h, cos = torch.ones(1, 128), torch.ones(1, 1, 32)
    with pytest.raises(RuntimeError, match=f"nothing is kept under the number {number}"):
        torch.ops.llama.compute_layers(h, number, 0, cache.kept.number, cos, cos, torch.tensor([0]), torch.tensor([0]))
