"""Rotary frequencies and what stretches them."""

import pytest
import torch

from llama.rotary import LinearScaling, Llama3Scaling, rope_factors, rope_frequencies


@pytest.mark.parametrize(
    "scaling", [LinearScaling(4.0), Llama3Scaling(8.0), Llama3Scaling(3.0, 1.0, 2.0, 64)]
)
def test_factors_are_what_the_frequencies_are_divided_by(scaling):
    plain = rope_frequencies(64, 500000.0, None)
    stretched = rope_frequencies(64, 500000.0, scaling)
    factors = rope_factors(64, 500000.0, scaling)
    torch.testing.assert_close(plain / factors, stretched)
    assert factors.max() == scaling.factor
    assert (factors >= 1).all()
