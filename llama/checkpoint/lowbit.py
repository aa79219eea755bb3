"""Low-bit directories: a Hugging Face directory whose linears are stored in blocks, with the format in config.json.

Ours name it under `quantization`, BigDL-LLM 2.4's under `bigdl_transformers_low_bit`. A packed weight is uint8 in the
published layout of its format (`llama/kernels/layouts.py`), (rows, bytes of a row); BigDL-LLM flattens it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..quantization import FORMATS, Format
from .arrays import Array, Mapped, PackedArray
from .settings import Settings
from .weight import CheckpointError

KEYS = ("quantization", "bigdl_transformers_low_bit")  # ours, BigDL-LLM's


@dataclass(frozen=True)
class LowBitMatrix(PackedArray):
    """A matrix in blocks of one of FORMATS; `read` dequantizes it to float32."""

    blocks: Array  # uint8 (rows, bytes of a row)
    form: Format

    @property
    def format(self) -> str:
        return self.form.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.blocks.shape[1] // self.form.block_bytes * self.form.block

    @property
    def stored(self) -> str:
        return self.format

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        if dim == 0:
            return self.form.dequantize(self.packed(0, start, stop))
        return self.form.dequantize(self.packed(0, 0, self.shape[0])).narrow(1, start, stop - start)

    def reordered(self, head_dim: int, reorder: Callable[[Tensor, int], Tensor]) -> LowBitMatrix:
        return replace(self, blocks=self.blocks.reordered(head_dim, reorder))

    def packed(self, dim: int, start: int, stop: int) -> Tensor:
        if dim == 0:
            return self.blocks.read(0, start, stop)
        block, scale = self.form.block, self.form.block_bytes
        if start % block or stop % block:
            raise CheckpointError(
                f"columns {start} to {stop} are not whole {self.format} blocks of {block}: "
                "use fewer ranks, or another format"
            )
        return self.blocks.read(1, start // block * scale, stop // block * scale).contiguous()


def lowbit_format(settings: Settings) -> str | None:
    """The format that a config.json names; None for an ordinary one. Raises CheckpointError for an unknown one."""
    settings.ignore("bigdl_lcmu_enabled")
    found = [format for key in KEYS if (format := settings.text(key)) is not None]
    for format in found:
        if format not in FORMATS:
            raise CheckpointError(
                f"{settings.file}: the low-bit format {format!r} is not supported; {', '.join(FORMATS)} are"
            )
    return found[0] if found else None


def as_matrix(array: Array, rows: int, what: str) -> Array:
    """BigDL-LLM's flat blocks as (rows, bytes of a row). Raises CheckpointError where they are not whole rows."""
    if len(array.shape) == 2:
        return array
    if not isinstance(array, Mapped) or array.shape[0] % rows:
        raise CheckpointError(f"{what}: {array.shape[0]} bytes are not {rows} rows of low-bit blocks")
    return Mapped(array.tensor.view(rows, -1), array.check)
