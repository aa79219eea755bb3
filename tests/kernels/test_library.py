"""The compiled operators as torch calls them."""

from collections.abc import Callable

import pytest
import torch
from support.allocated import IS_KNOWN, left_behind

from llama.kernels import attention, dense, elementwise, layer, library, lowbit, lowrank
from llama.kernels.formats import FORMATS

compiled = pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
Call = Callable[[], object]
COLUMNS = 64
TABLE = attention.row_table([(0, [(0, 3)])])


def product(outputs: int) -> layer.LayerProduct:
    form = FORMATS["sym_int4"]
    packed = torch.zeros(outputs, COLUMNS // form.block * form.block_bytes, dtype=torch.uint8)
    return layer.LayerProduct(lowbit.to_tiles([packed], form), None, form.name, outputs)


def step(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor | None, ...]:
    """One token's angles and slot, two heads' keys and values, their scales, and what it sees."""
    angles, slots, numbers = torch.ones(1, 1, 16), torch.tensor([2]), torch.zeros(2, 64, 16, dtype=dtype)
    scales = torch.zeros(2, 64) if dtype == torch.int8 else None
    return angles, angles, slots, numbers, numbers.clone(), scales, scales, TABLE


def rms_norm() -> Call:
    x, weight = torch.ones(1, COLUMNS), torch.ones(COLUMNS)
    return lambda: elementwise.rms_norm(x, weight, 1e-5)


def lowbit_linear() -> Call:
    x, weight = torch.ones(1, COLUMNS), product(16)
    return lambda: lowbit.lowbit_linear(x, *weight)


def lowbit_rows() -> Call:
    form, rows = FORMATS["q8_0"], torch.tensor([1, 0])
    table = torch.zeros(2, 2 * form.block_bytes, dtype=torch.uint8)
    return lambda: lowbit.lowbit_rows(table, rows, form)


def dense_linear(rows: int = 1) -> Call:
    x, weight, bias = torch.ones(rows, COLUMNS), torch.ones(16, COLUMNS), torch.ones(16)
    return lambda: dense.dense_linear(x, weight, bias)


def dense_linear_of_many_rows() -> Call:
    return dense_linear(100)


def attend_rows() -> Call:
    qkv, rest = torch.ones(1, 6, 16), step()
    return lambda: attention.attend_rows(qkv, *rest)


def attend_rows_of_int8() -> Call:
    qkv, rest = torch.ones(1, 6, 16), step(torch.int8)
    return lambda: attention.attend_rows(qkv, *rest)


def compute_layer() -> Call:
    h, norms, rest = torch.ones(1, COLUMNS), [torch.ones(COLUMNS)] * 2, step()
    one = operands(norms)
    return lambda: layer.compute_layer(h, one, *rest)


def operands(norms: list[torch.Tensor]) -> layer.LayerOperands:
    products = [product(outputs) for outputs in (8 * 16, COLUMNS, 2 * COLUMNS, COLUMNS)]
    return layer.LayerOperands.of(norms, 1e-5, products)


def compute_layers(dtype: torch.dtype = torch.float32) -> Call:
    h, norms = torch.ones(1, COLUMNS), [torch.ones(COLUMNS)] * 2
    cos, sin, slots, keys, values, key_scale, value_scale, table = step(dtype)
    three = layer.KeptLayers(*layer.LayerOperands.joined([operands(norms)] * 3))
    stores = layer.KeptStores(*([] if one is None else [one] * 3 for one in (keys, values, key_scale, value_scale)))
    return lambda: layer.compute_layers(h, three, None, stores, cos, sin, slots, table)


def compute_layers_of_int8() -> Call:
    return compute_layers(torch.int8)


def add_low_rank() -> Call:
    factors = lowrank.Factors.of([(torch.ones(2, COLUMNS), torch.ones(16, 2))], [0])
    rows, x, y = lowrank.LowRankRows([lowrank.Group(0, 1, factors)]), torch.ones(1, COLUMNS), torch.zeros(1, 16)
    return lambda: rows.apply(y, x)


@compiled
@pytest.mark.skipif(not IS_KNOWN, reason="this C library does not tell what is allocated")
@pytest.mark.parametrize(
    "make",
    [
        rms_norm,
        lowbit_linear,
        lowbit_rows,
        dense_linear,
        dense_linear_of_many_rows,
        attend_rows,
        attend_rows_of_int8,
        compute_layer,
        compute_layers,
        compute_layers_of_int8,
        add_low_rank,
    ],
)
def test_a_call_of_an_operator_leaves_nothing_behind(make):
    call = make()
    with torch.inference_mode():
        assert left_behind(call, 300) < 16  # a string that is forgotten takes 48 bytes
