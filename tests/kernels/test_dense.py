"""Products of plain weights: the compiled kernel gives what the matrix library gives, and a row is alone in it."""

import pytest
import torch
import torch.nn.functional as F
from support.threads import threads

from llama.kernels import library
from llama.kernels.dense import dense_linear, serves_weight

pytestmark = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
EXACT = {torch.float32: dict(rtol=1e-5, atol=1e-4), torch.bfloat16: dict(rtol=2**-7, atol=1e-4)}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("variant", library.instruction_sets())
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("outputs", "columns"), [(1, 16), (3, 48), (530, 176), (64, 2048)])
def test_every_number_of_rows_gives_what_the_matrix_library_gives(outputs, columns, dtype, variant):
    weight, bias = numbers(outputs, columns, dtype=dtype, seed=1), numbers(outputs, dtype=dtype, seed=2)
    for rows in (0, 1, 2, 3, 4, 5, 7, 16, 70):
        x = numbers(rows, columns, dtype=dtype)
        for added in (None, bias):
            expected = F.linear(x.double(), weight.double(), None if added is None else added.double()).to(dtype)
            result = dense_linear(x, weight, added, variant)
            assert result.dtype == dtype
            torch.testing.assert_close(result, expected, **EXACT[dtype])


def test_more_rows_than_the_kernel_is_faster_with_are_the_librarys():
    weight, x = numbers(40, 64, seed=1), numbers(65, 64)
    assert torch.equal(dense_linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", EXACT)
def test_a_rows_bits_depend_neither_on_the_others_nor_on_the_threads(dtype):
    weight, x = numbers(2051, 96, dtype=dtype, seed=1), numbers(64, 96, dtype=dtype)
    variant = library.instruction_sets()[0]
    alone = torch.cat([dense_linear(row, weight, variant=variant) for row in x.split(1)])
    for number in (1, 2, 3):
        with threads(number):
            for rows in (2, 3, 5, 64):
                assert torch.equal(dense_linear(x[:rows], weight, variant=variant), alone[:rows])


def test_leading_dimensions_and_strides_are_kept():
    weight, x = numbers(24, 32, seed=1), numbers(2, 3, 64)[..., ::2]
    result = dense_linear(x, weight.T.contiguous().T)
    assert result.shape == (2, 3, 24)
    torch.testing.assert_close(result, F.linear(x, weight), **EXACT[torch.float32])


@pytest.mark.parametrize("columns", [15, 40])
def test_other_lengths_and_types_are_the_librarys(columns):
    weight, x = numbers(8, columns, seed=1), numbers(2, columns)
    assert not serves_weight(weight)
    assert torch.equal(dense_linear(x, weight), F.linear(x, weight))
    assert torch.equal(dense_linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "what"),
    [
        (numbers(1, 32), numbers(4, 16), None, "as long as"),
        (numbers(1, 16), numbers(4, 16), numbers(3), "bias"),
        (numbers(1, 16).bfloat16(), numbers(4, 16), None, "both in"),
    ],
)
def test_what_does_not_fit_together_is_refused(x, weight, bias, what):
    with pytest.raises(RuntimeError, match=what):
        torch.ops.llama.dense_linear(x, weight, bias, "auto")
