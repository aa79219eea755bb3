"""What adapters add: the compiled operator against its twin."""

import pytest
import torch
from support.threads import threads

from llama.kernels import library, lowrank
from llama.kernels.lowrank import Factors, Group, LowRankRows, add_low_rank_twin

compiled = pytest.mark.skipif(library.operator("add_low_rank") is None, reason="the kernel was not compiled")
VARIANTS = ["avx512_vnni", "avx2", "scalar"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
COLUMNS = 96
ROWS = [2, 1, 3, 7, 4]  # of each group; between them lie rows of the base model


def needs(variant: str) -> None:
    if variant not in library.instruction_sets():
        pytest.skip(f"this machine cannot run {variant}")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(seed: int, dtype: torch.dtype = torch.float32, rank: int = 5) -> Factors:
    """Of three parts, the middle one of another rank, with a gap before the last."""
    sizes = [(rank, 48), (rank + 3, 16), (rank, 32)]
    pairs = [(numbers(r, COLUMNS, dtype=dtype, seed=seed) / 8, numbers(n, r, dtype=dtype, seed=seed)) for r, n in sizes]
    return Factors.of(pairs, [0, 48, 80])


def groups(dtype: torch.dtype = torch.float32) -> list[Group]:
    starts = [sum(ROWS[:i]) + i for i in range(len(ROWS))]
    return [Group(start, num, factors(i, dtype)) for i, (start, num) in enumerate(zip(starts, ROWS, strict=True))]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_group_gets_what_its_twin_adds_and_no_other_row_is_touched(variant, dtype):
    needs(variant)
    x, y = numbers(22, COLUMNS, dtype=dtype, seed=9), numbers(22, 112, dtype=dtype, seed=8)
    found, expected = y.clone(), y.clone()
    LowRankRows(groups(dtype), variant).apply(found, x)
    for group in groups(dtype):
        rows = slice(group.first_row, group.first_row + group.num_rows)
        add_low_rank_twin(expected[rows], x[rows], group.factors)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    touched = torch.zeros(22, 112, dtype=torch.bool)
    for group in groups():
        touched[group.first_row : group.first_row + group.num_rows] = True
    touched[:, 64:80] = False
    assert torch.equal(found == y, ~touched)


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rows_bits_do_not_depend_on_the_other_rows(variant):
    needs(variant)
    x, y, one = numbers(15, COLUMNS), torch.zeros(15, 112), factors(3)
    LowRankRows([Group(0, 15, one)], variant).apply(y, x)
    for row in (0, 5, 13, 14):
        alone = torch.zeros(1, 112)
        LowRankRows([Group(0, 1, one)], variant).apply(alone, x[row : row + 1])
        assert torch.equal(alone[0], y[row])


@compiled
def test_many_threads_give_the_same_bits():
    x = numbers(8, 2048)
    one = Factors.of([(numbers(16, 2048), numbers(4096, 16, seed=1))], [0])
    results = []
    for number in (1, 3):
        with threads(number):
            y = torch.zeros(8, 4096)
            LowRankRows([Group(0, 3, one), Group(3, 5, one)]).apply(y, x)
            results.append(y)
    assert torch.equal(*results)


@compiled
def test_numbers_that_fit_in_16_bits_are_held_in_16_and_no_others():
    short = [(numbers(4, 32, dtype=torch.bfloat16).float(), numbers(16, 4, dtype=torch.bfloat16).float())]
    long = [(short[0][0], short[0][1] + 1e-5)]
    assert Factors.of(short, [0]).numbers.dtype == torch.bfloat16
    assert Factors.of(long, [0]).numbers.dtype == torch.float32
    x, y, expected = numbers(3, 32), torch.zeros(3, 16), torch.zeros(3, 16)
    LowRankRows([Group(0, 3, Factors.of(short, [0]))]).apply(y, x)
    expected.addmm_(x @ short[0][0].T, short[0][1].T)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_factors_come_back_as_they_were_in_either_order(monkeypatch, is_compiled):
    if not is_compiled:
        monkeypatch.setattr(lowrank, "serves", lambda x: False)
    pairs = [(numbers(3, 48), numbers(32, 3)), (numbers(5, 48, seed=1), numbers(16, 5, seed=1))]
    a, [b, c] = Factors.of(pairs, [0, 32]).matrices(torch.float32)
    assert torch.equal(a, torch.cat([pairs[0][0], pairs[1][0]]))
    assert torch.equal(b, pairs[0][1].T)
    assert torch.equal(c, pairs[1][1].T)


def test_other_types_and_sizes_are_left_to_pytorch():
    for a, b in [(numbers(2, 24), numbers(16, 2)), (numbers(2, 32), numbers(17, 2)), (numbers(2, 32).half(),) * 2]:
        assert Factors.of([(a, b if b.shape[1] == 2 else b.T)], [0]).width is None


@compiled
def test_the_operator_keeps_torchs_rules():
    [first, *_] = groups()
    arguments = (torch.zeros(22, 112), numbers(22, COLUMNS), [first.factors.numbers], list(first.layout()), "auto")
    torch.library.opcheck(torch.ops.llama.add_low_rank.default, arguments)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 22}, "impossible layout"),  # rows begin where there are none
        ({1: 23}, "impossible layout"),
        ({2: 4}, "impossible layout|wrong size"),
        ({3: 900}, "impossible layout|wrong size"),
        ({4: 80}, "impossible layout"),  # a part that ends beyond the outputs
        ({5: 40}, "multiples of 16"),
    ],
)
def test_a_call_that_would_read_beyond_its_memory_is_refused(change, message):
    one = factors(0)
    layout = list(Group(0, 22, one).layout())
    for place, number in change.items():
        layout[place] = number
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llama.add_low_rank(torch.zeros(22, 112), numbers(22, COLUMNS), [one.numbers], layout, "auto")
    with pytest.raises(RuntimeError, match="both in"):
        torch.ops.llama.add_low_rank(torch.zeros(22, 112).half(), numbers(22, COLUMNS), [], [], "auto")
