"""What decoding does with the cache in every layer: storing rows, and attention of single rows for all requests.

Each is one compiled operator on the CPU. PyTorch's operators define both: those of `attend_rows_twin`, and those that
`store_rows` falls back to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llama.kernels import library


def row_table(rows: Iterable[tuple[int, Sequence[tuple[int, int]]]]) -> Tensor:
    """(row of q, its runs of slots as (first slot, length)) ... as the flat int64 table that `attend_rows` reads."""
    return torch.tensor(
        [number for row, runs in rows for number in (row, len(runs), *(n for run in runs for n in run))],
        dtype=torch.int64,
    )


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    table: Tensor,
    out: Tensor,
    variant: str = "auto",
) -> None:
    """Fills the rows of `out` that `table` names: each row of q attends over its own runs of slots.

    q, out: (rows, heads, head_dim) bfloat16 or float32. keys, values: (kv_heads, slots, head_dim) of that type, or
    int8 with float32 scales (kv_heads, slots). table: what `row_table` makes; a row occurs once. Scores are scaled by
    head_dim ** -0.5 and computed in float32. Raises RuntimeError for a table that leaves the cache.
    """
    torch.ops.llama.attend_rows(q, keys, values, key_scale, value_scale, table, out, variant)


def store_rows(rows: Tensor, slots: Tensor, numbers: Tensor, scales: Tensor | None) -> None:
    """Puts rows (num_tokens, kv_heads, head_dim) into `numbers` (kv_heads, num_slots, head_dim) at slots (num_tokens,).

    `numbers` has the rows' dtype, or is int8 beside float32 scales (kv_heads, num_slots): each row is then rounded to
    steps of 1/127 of its largest magnitude, and its scale is what a step is worth. Slots are int64, each named once.
    """
    if library.serves(rows, 1) and rows.stride()[1:] == (rows.shape[-1], 1):
        return torch.ops.llama.store_rows(rows, slots, numbers, scales)
    rows = rows.transpose(0, 1)
    if scales is not None:
        worth = rows.abs().amax(-1).float() / 127
        scales.index_copy_(1, slots, worth)
        rows = (rows / worth.clamp_min(1e-30).unsqueeze(-1)).round_().to(torch.int8)
    numbers.index_copy_(1, slots, rows)


if library.AVAILABLE:

    @torch.library.register_fake("llama::attend_rows")
    def _(*arguments: object) -> None:
        return None

    @torch.library.register_fake("llama::store_rows")
    def _(*arguments: object) -> None:
        return None


def attend_rows_twin(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    table: Tensor,
    out: Tensor,
) -> None:
    """What `attend_rows` means, in PyTorch operators and float32; slow."""
    numbers = iter(table.tolist())
    for row in numbers:
        runs = [(next(numbers), next(numbers)) for _ in range(next(numbers))]
        slots = torch.cat([torch.arange(slot, slot + length) for slot, length in runs])
        k, v = keys[:, slots].float(), values[:, slots].float()
        if key_scale is not None:
            k, v = k * key_scale[:, slots].unsqueeze(-1), v * value_scale[:, slots].unsqueeze(-1)
        grouped = q[row].float().unflatten(0, (keys.shape[0], -1))  # (kv_heads, group, head_dim)
        weights = (grouped @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out[row] = (weights @ v).flatten(0, 1).to(out.dtype)
