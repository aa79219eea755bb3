"""Norm, rotation and gate: the compiled kernels against PyTorch's operators."""

import pytest
import torch

from llama.kernels import elementwise, library
from llama.kernels.elementwise import rms_norm, rotate, swiglu

compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def both_ways(monkeypatch, function, *arguments):
    """By the kernel, and by PyTorch's operators."""
    by_kernel = function(*arguments)
    monkeypatch.setattr(elementwise, "serves", lambda x, multiple=16: False)
    return by_kernel, function(*arguments)


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[result.dtype], atol=TOLERANCE[result.dtype])


@compiled
@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_what_pytorch_composes(monkeypatch, dtype, rows):
    x, weight = numbers(rows, 48, dtype=dtype), numbers(48, dtype=dtype, seed=1)
    x[0] = 0
    assert_close(*both_ways(monkeypatch, rms_norm, x, weight, 1e-5))


@compiled
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_is_what_pytorch_composes(monkeypatch, dtype, tokens):
    joint = numbers(tokens, 7, 32, dtype=dtype)
    angles = torch.rand(tokens, 1, 32, generator=torch.Generator().manual_seed(1)) * 6
    assert_close(*both_ways(monkeypatch, rotate, joint[:, :5], angles.cos(), angles.sin()))


@compiled
@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_what_pytorch_composes(monkeypatch, dtype, rows):
    x = numbers(rows, 64, dtype=dtype)
    x[0, :8] = torch.tensor([0, -0.0, 80, -80, 1e4, -1e4, 1e-30, -1e-30])
    assert_close(*both_ways(monkeypatch, swiglu, x))


@compiled
@pytest.mark.parametrize("function", [lambda x: rms_norm(x, x[0], 1e-5), swiglu])
def test_what_is_not_a_number_stays_so(function):
    x = torch.zeros(2, 32)
    x[1, 3] = float("nan")
    assert function(x)[1].isnan().any()


@compiled
def test_a_rows_bits_do_not_depend_on_the_other_rows():
    x = numbers(1000, 64, dtype=torch.float32)
    weight = torch.ones(64)
    assert torch.equal(rms_norm(x, weight, 1e-5)[700], rms_norm(x[700:701], weight, 1e-5)[0])
    assert torch.equal(swiglu(x)[700], swiglu(x[700:701])[0])


def test_other_types_and_sizes_are_left_to_pytorch():
    assert rms_norm(torch.ones(2, 24), torch.ones(24), 0.0).shape == (2, 24)
    assert rms_norm(torch.ones(2, 32), torch.ones(32).half(), 0.0).shape == (2, 32)
    assert swiglu(torch.ones(2, 32).half()).dtype == torch.float16
    angles = torch.ones(2, 1, 16)
    assert rotate(torch.ones(2, 16, 3).transpose(1, 2), angles, angles).shape == (2, 3, 16)


@compiled
def test_the_operators_keep_torchs_rules():
    x, angles = numbers(3, 2, 32, dtype=torch.float32), torch.ones(3, 1, 32)
    torch.library.opcheck(torch.ops.llama.rms_norm.default, (x, torch.ones(32), 1e-5))
    torch.library.opcheck(torch.ops.llama.rotate.default, (x, angles, angles))
    torch.library.opcheck(torch.ops.llama.swiglu.default, (x,))


@compiled
def test_a_call_that_would_read_beyond_its_memory_is_refused():
    with pytest.raises(RuntimeError, match="one number of x's type"):
        torch.ops.llama.rms_norm(torch.ones(2, 32), torch.ones(16), 1e-5)
    with pytest.raises(RuntimeError, match="multiples of 32"):
        torch.ops.llama.swiglu(torch.ones(2, 48))
    with pytest.raises(RuntimeError, match="cos and sin"):
        torch.ops.llama.rotate(torch.ones(2, 1, 16), torch.ones(1, 1, 16), torch.ones(2, 1, 16))
