"""Rotary frequencies and what stretches them."""

import math

import pytest
import torch

from llama.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    YarnScaling,
    rope_factors,
    rope_frequencies,
    turning_rates,
)


@pytest.mark.parametrize("scaling", [LinearScaling(4.0), Llama3Scaling(8.0), Llama3Scaling(3.0, 1.0, 2.0, 64)])
def test_factors_are_what_the_frequencies_are_divided_by(scaling):
    plain = rope_frequencies(64, 500000.0, None)
    stretched = rope_frequencies(64, 500000.0, scaling)
    factors = rope_factors(64, 500000.0, scaling)
    torch.testing.assert_close(plain / factors, stretched)
    assert factors.max() == scaling.factor
    assert (factors >= 1).all()


def test_dynamic_scaling_changes_nothing_up_to_the_length_of_training_and_each_token_by_its_own_request_beyond():
    scaling, limits = DynamicScaling(4.0, 100), torch.tensor([1, 100, 101, 200])
    plain = rope_frequencies(64, 10000.0, None)
    each = rope_frequencies(64, 10000.0, scaling, limits=limits)
    assert torch.equal(each[0], plain)
    assert torch.equal(each[1], plain)
    assert torch.equal(each[3], rope_frequencies(64, 10000.0, scaling, limits=limits[3:])[0])
    assert each[3, 0] == plain[0]
    torch.testing.assert_close(plain[-1] / each[3, -1], torch.tensor(4.0 * 200 / 100 - 3))
    assert torch.equal(rope_frequencies(64, 10000.0, scaling), plain)


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_lengthens_vectors():
    plain = rope_frequencies(64, 10000.0, None)
    stretched = rope_frequencies(64, 10000.0, YarnScaling(8.0, 4096))
    assert torch.equal(stretched[0], plain[0])
    assert torch.equal(stretched[-1], plain[-1] / 8)
    assert YarnScaling(8.0, 4096).magnitude == pytest.approx(1 + 0.1 * math.log(8))
    assert YarnScaling(8.0, 4096, attention_factor=0.7).magnitude == 0.7
    rotary = Rotary.at(torch.arange(5), turning_rates(stretched), 1.5)
    x = torch.randn(5, 2, 64)
    torch.testing.assert_close(rotary(x).norm(dim=-1), 1.5 * x.norm(dim=-1))


def test_a_yarn_ramp_between_equal_ends_is_a_step():
    scaling = YarnScaling(8.0, 4096, beta_fast=4.0, beta_slow=4.0, truncate=False)
    factors = rope_factors(64, 10000.0, scaling)
    assert set(factors.round(decimals=3).tolist()) == {1.0, 8.0}
