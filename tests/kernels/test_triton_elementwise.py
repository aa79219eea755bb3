"""Triton's norm and gate against PyTorch's: on a GPU, or in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from llama.kernels.cuda import elementwise as gpu
from llama.kernels.cuda import serves_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}  # the interpreter cuts bfloat16 off


def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(len(size))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 64), (3, 100), (2, 5, 4096), (0, 32)])
def test_a_norm_is_pytorchs(size, dtype):
    x, weight = 3 * random(*size, dtype=dtype), random(size[-1], dtype=dtype)
    expected = F.rms_norm(x, weight.shape, None, 1e-5) * weight
    torch.testing.assert_close(gpu.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 64), (3, 200), (2, 5, 4100), (0, 32)])
def test_a_gate_is_pytorchs(size, dtype):
    x = random(*size, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(gpu.swiglu(x), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rows_of_any_stride_are_taken():
    x, weight = random(64, 5, dtype=torch.float32).t(), random(64, dtype=torch.float32)
    assert torch.equal(gpu.rms_norm(x, weight, 1e-5), gpu.rms_norm(x.contiguous(), weight, 1e-5))
    assert torch.equal(gpu.swiglu(x), gpu.swiglu(x.contiguous()))


def test_what_is_not_on_a_gpu_is_left_to_others():
    assert not serves_gpu(torch.zeros(1))
    assert serves_gpu(random(1, dtype=torch.float16)) == (DEVICE == "cuda")
    assert not serves_gpu(random(1, dtype=torch.float64))
