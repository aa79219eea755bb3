import gc
import weakref

import pytest
import torch
from torch import nn

from llama.kernels import library
from llama.linear import Joint, Linear, LoadsItself
from llama.quantization import LowBitLinear


class Layer(nn.Module):
    """Linears of random weights over one input of 64 numbers, and their joint."""

    def __init__(self, **linears: nn.Module):
        super().__init__()
        for name, linear in linears.items():
            setattr(self, name, linear)
        self.joint = Joint(self, *linears)


def plain(rows: int, bias: bool = False) -> Linear:
    linear = Linear(64, rows, bias)
    generator = torch.Generator().manual_seed(rows)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def lowbit(rows: int, format: str = "sym_int4") -> LowBitLinear:
    return LowBitLinear.from_weight(format, plain(rows).weight)


KINDS = {
    "plain": lambda: {"a": plain(8), "b": plain(24), "c": plain(3)},
    "with biases": lambda: {"a": plain(8, bias=True), "b": plain(24, bias=True)},
    "low-bit": lambda: {"a": lowbit(5), "b": lowbit(16), "c": lowbit(40)},
    "of two formats": lambda: {"a": lowbit(16), "b": lowbit(5, "q8_0")},
    "of two kinds": lambda: {"a": lowbit(16), "b": plain(5)},
    "alone": lambda: {"a": plain(8)},
    "alone and low-bit": lambda: {"a": lowbit(8)},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_joint_gives_the_results_of_its_parts_side_by_side_prepared_or_not(kind):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    parts = kind()
    expected = torch.cat([linear(x) for linear in parts.values()], dim=-1)
    layer = Layer(**parts)
    names = set(layer.state_dict())
    torch.testing.assert_close(layer.joint(x), expected)
    layer.joint.prepare()
    # the compiled kernels round activations to 8 bits
    scale = expected.abs().max().item()
    torch.testing.assert_close(layer.joint(x), expected, rtol=0, atol=2e-2 * scale)
    assert set(layer.state_dict()) == names


def test_a_joint_of_one_part_is_that_part():
    layer = Layer(only=plain(8))
    before = layer.only.weight
    layer.joint.prepare()
    assert layer.joint.joint is layer.only
    assert layer.only.weight is before


def test_a_joint_finds_a_linear_that_took_the_place_of_another():
    layer = Layer(a=plain(8), b=plain(24))
    layer.a = lowbit(8)
    assert layer.joint.linears == [layer.a, layer.b]


def test_weights_are_freed_with_their_layer_and_wait_for_no_collector():
    layer = Layer(a=plain(8), b=plain(24))
    layer.joint.prepare()
    weight = weakref.ref(layer.a.weight)
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()


def test_low_bit_linears_load_themselves_and_plain_ones_are_assigned():
    assert isinstance(lowbit(8), LoadsItself)
    assert not isinstance(plain(8), LoadsItself)


def blocked(linear: Linear, fixed_rows: int | None = None) -> Linear:
    """What `prepare` does where the processor computes in bfloat16."""
    linear.blocked = torch.ops.mkldnn._reorder_linear_weight(linear.weight, 32)
    linear.weight = None
    return linear


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("is_blocked", [False, True], ids=["", "in the processor's order"])
def test_the_state_of_prepared_linears_is_what_they_were_loaded_with(kind, is_blocked, monkeypatch):
    layer = Layer(**kind())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    if is_blocked:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch was built without oneDNN")
        monkeypatch.setattr(Linear, "prepare", blocked)
    layer.joint.prepare()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
@pytest.mark.parametrize("kind", [KINDS["low-bit"], KINDS["plain"]], ids=["low-bit", "plain"])
def test_what_is_held_in_another_order_is_not_loaded_over(kind, monkeypatch):
    layer = Layer(**kind())
    state = layer.state_dict()
    monkeypatch.setattr(Linear, "prepare", blocked)
    layer.joint.prepare()
    with pytest.raises(RuntimeError, match=r"a\.weight is .* weights are loaded before `prepare`"):
        layer.load_state_dict(state)


def test_the_parts_of_a_joint_that_is_not_rearranged_are_views_of_it():
    layer = Layer(a=plain(8, bias=True), b=plain(24, bias=True))
    layer.joint.prepare()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layer.load_state_dict({name: torch.ones_like(tensor) for name, tensor in layer.state_dict().items()})
    torch.testing.assert_close(layer.joint(x), (x.sum(-1, keepdim=True) + 1).expand(-1, 32))
