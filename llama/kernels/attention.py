"""What a step does with the cache in every layer, for all its requests: one compiled operator on the CPU.

PyTorch's operators define it (`attend_rows_twin`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from llama.kernels import library
from llama.kernels.elementwise import rotate_twin

_attend_rows = library.operator("attend_rows")


def row_table(rows: Iterable[tuple[int, Sequence[tuple[int, int]]]]) -> Tensor:
    """(row of q, its runs of slots as (first slot, length)) ... as the flat int64 table that `attend_rows` reads."""
    numbers: list[int] = []
    for row, runs in rows:
        numbers += (row, len(runs), *chain.from_iterable(runs))
    return torch.tensor(numbers, dtype=torch.int64)


def attend_rows(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    table: Tensor,
    variant: str = "auto",
) -> Tensor:
    """Rotates queries and keys, stores keys and values of every token, and lets the rows that `table` names attend.

    qkv (num_tokens, query + key + value heads, head_dim): bfloat16 or float32, heads side by side, of any stride from
    token to token. cos, sin (num_tokens, 1, head_dim) float32: see `rotate`. keys, values (kv_heads, num_slots,
    head_dim): of that type, or int8 with float32 scales (kv_heads, num_slots); written at slots (num_tokens,) int64,
    each named once, as `store_rows` describes. table: what `row_table` makes; a row occurs once. Scores are scaled by
    head_dim ** -0.5 and computed in float32. Returns (num_tokens, query heads, head_dim) in qkv's dtype; rows that the
    table does not name hold nothing. Raises RuntimeError for other shapes and types, and for slots or a table that
    leave the cache, with nothing stored.
    """
    return _attend_rows(qkv, cos, sin, slots, keys, values, key_scale, value_scale, table, variant)


if library.AVAILABLE:

    @torch.library.register_fake("llama::attend_rows")
    def _(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, *_: object) -> Tensor:
        return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[0], qkv.shape[2])


def store_rows(rows: Tensor, slots: Tensor, numbers: Tensor, scales: Tensor | None) -> None:
    """Puts rows (num_tokens, kv_heads, head_dim) into `numbers` (kv_heads, num_slots, head_dim) at slots (num_tokens,).

    `numbers` has the rows' dtype, or is int8 beside float32 scales (kv_heads, num_slots): each row is then rounded to
    steps of 1/127 of its largest magnitude, and its scale is what a step is worth. Slots are int64, each named once.
    By PyTorch's operators.
    """
    rows = rows.transpose(0, 1)
    if scales is not None:
        worth = rows.abs().amax(-1).float() / 127
        scales.index_copy_(1, slots, worth)
        rows = (rows / worth.clamp_min(1e-30).unsqueeze(-1)).round_().to(torch.int8)
    numbers.index_copy_(1, slots, rows)


def attend_rows_twin(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    table: Tensor,
) -> Tensor:
    """What `attend_rows` means, in PyTorch operators and float32; slow."""
    q, k, v = qkv.tensor_split((-2 * len(keys), -len(keys)), dim=1)
    store_rows(rotate_twin(k, cos, sin), slots, keys, key_scale)
    store_rows(v, slots, values, value_scale)
    q, out = rotate_twin(q, cos, sin), q.new_empty(q.shape)
    numbers = iter(table.tolist())
    for row in numbers:
        runs = [(next(numbers), next(numbers)) for _ in range(next(numbers))]
        seen = torch.cat([torch.arange(slot, slot + length) for slot, length in runs])
        stored_keys, stored_values = keys[:, seen].float(), values[:, seen].float()
        if key_scale is not None:
            stored_keys = stored_keys * key_scale[:, seen].unsqueeze(-1)
            stored_values = stored_values * value_scale[:, seen].unsqueeze(-1)
        grouped = q[row].float().unflatten(0, (keys.shape[0], -1))  # (kv_heads, group, head_dim)
        weights = (grouped @ stored_keys.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out[row] = (weights @ stored_values).flatten(0, 1).to(out.dtype)
    return out
