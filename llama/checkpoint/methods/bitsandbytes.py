"""bitsandbytes: QLoRA's four bits (arXiv:2305.14314) and LLM.int8's eight (arXiv:2208.07339).

Four bits: the matrix, row after row, in blocks of `blocksize` codes, two to a byte, the first in the high bits; a code
stands for an entry of a table of 16 times its block's `absmax`. With "double quantization" the absmax are themselves
codes of 8 bits, in blocks with a scale each, around a common offset. Eight bits: one scale a row, 127 times as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...files.errors import CheckpointError
from ...files.json import parse_json
from ...kernels.formats import FORMATS, NF4_LEVELS, LowBitFormat
from ..arrays import Array, Mapped
from ..settings import REQUIRED, Settings
from .method import Method, Parts, QuantizedMatrix, Where, are_halves, check, packable, require
from .scaled import eight_bits, is_plain, scaled

MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class NestedScales(Array):
    """Scales that are codes of 8 bits: float32 (n,)"""

    codes: Mapped  # uint8 (n,)
    table: Tensor  # float32 (256,)
    scales: Mapped  # float32, one for each `block` codes
    block: int
    offset: float
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        scales = self.scales.tensor[torch.arange(start, stop) // self.block]
        return self.table[self.codes.read(0, start, stop).long()] * scales + self.offset


@dataclass(frozen=True)
class TableMatrix(QuantizedMatrix):
    """Codes of 4 bits that stand for the entries of a table."""

    kind: str  # "nf4" or "fp4"
    packed: Mapped  # uint8, flat
    table: Tensor  # float32 (16,)
    absmax: Array  # one for each block
    block: int
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def stored(self) -> str:
        return self.kind

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    def fitting(self) -> LowBitFormat | None:
        """nf4 where its blocks hold these codes and scales as they are; None where not."""
        form, inputs = FORMATS["nf4"], self.size[1]
        is_nf4 = torch.equal(self.table, torch.tensor(NF4_LEVELS))
        in_blocks = self.block % form.block == 0 and inputs % self.block == 0
        is_held = is_nf4 and in_blocks and not isinstance(self.absmax, NestedScales) and are_halves(self.absmax)
        return form if is_held else None

    def codes(self, first: int, last: int) -> Tensor:
        """Codes uint8 of these blocks, one after the other; the last block may be a short one."""
        packed = self.packed.read(0, first * self.block // 2, min(last * self.block // 2, self.packed.shape[0]))
        return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()

    def values(self, rows: slice) -> Tensor:
        inputs = self.size[1]
        first, last = rows.start * inputs // self.block, -(-rows.stop * inputs // self.block)
        codes = self.codes(first, last)
        scales = self.absmax.read(0, first, last).float().repeat_interleave(self.block)[: len(codes)]
        numbers = self.table[codes.int()] * scales
        skipped = rows.start * inputs - first * self.block
        return numbers[skipped : skipped + (rows.stop - rows.start) * inputs].view(-1, inputs)

    def fields(self, rows: slice, columns: slice, form: LowBitFormat) -> tuple[Tensor, ...]:
        blocks_of_row = self.size[1] // self.block
        first, last = rows.start * blocks_of_row, rows.stop * blocks_of_row
        codes = self.codes(first, last).view(-1, self.size[1])[:, columns].unflatten(1, (-1, form.block))
        scales = self.absmax.read(0, first, last).float().view(-1, blocks_of_row, 1)
        scales = scales.repeat_interleave(self.block // form.block, 1)
        return codes, scales[:, columns.start // form.block : columns.stop // form.block]


class BitsAndBytes(Method):
    """Linear4bit and Linear8bitLt; what is stored says which of them a layer is."""

    states: ClassVar[tuple[str, ...]] = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    parts = (
        *("weight", "SCB", "weight_format", *states),
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    )

    def __init__(self, settings: Settings) -> None:
        """All that counts is stored with the matrices."""

    def matrix(self, where: Where, parts: Parts) -> Array:
        require(where, parts, "weight")
        weight = parts["weight"]
        state = next((parts[name] for name in self.states if name in parts), None)
        if state is not None:
            return self._four_bits(where, parts, state)
        if is_plain(weight):
            return weight
        require(where, parts, "SCB")
        if "weight_format" in parts and parts["weight_format"].tensor.tolist() not in (0, [0]):
            raise CheckpointError(f"{where}.weight_format: only matrices stored row by row can be read")
        numbers = eight_bits(where, weight)
        check(where, "SCB", parts["SCB"], numbers.shape[:1], is_number=True)
        return scaled(where, numbers, parts["SCB"], factor=1 / 127)

    def _four_bits(self, where: Where, parts: Parts, stored: Mapped) -> Array:
        require(where, parts, "weight.absmax", "weight.quant_map")
        if stored.dtype != torch.uint8:
            raise CheckpointError(f"{where}.weight.quant_state: is {stored.stored}; the bytes of JSON are expected")
        data = bytes(stored.tensor.flatten().tolist())
        state = Settings(parse_json(data, where.file, MAX_STATE_BYTES), where.file, f"{where.module}.quant_state.")
        size, block = state.values.get("shape"), state.integer("blocksize", REQUIRED, low=2, high=1 << 16)
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise state.error("shape", size, "the sizes of a matrix are expected")
        count = size[0] * size[1]
        weight = parts["weight"]
        packed = Mapped(weight.tensor.reshape(-1).view(torch.uint8), weight.check)
        if packed.shape != (-(-count // 2),) or block % 2:
            raise CheckpointError(f"{where}.weight: {packed.nbytes} bytes are not {size} in blocks of {block}")
        absmax = parts["weight.absmax"]
        nested = "weight.nested_absmax" in parts
        if nested and absmax.dtype != torch.uint8:
            raise CheckpointError(f"{where}.weight.absmax: is {absmax.stored}, expected uint8")
        check(where, "weight.absmax", absmax, (-(-count // block),), is_number=not nested)
        check(where, "weight.quant_map", parts["weight.quant_map"], (16,), is_number=True)
        table = parts["weight.quant_map"].tensor.float()
        scales = self._nested(where, parts, state) if nested else absmax
        kind = state.text("quant_type", REQUIRED)
        matrix = TableMatrix(kind, packed, table, scales, block, (size[0], size[1]))
        form = matrix.fitting()
        return matrix if form is None else packable(matrix, form)

    def _nested(self, where: Where, parts: Parts, state: Settings) -> NestedScales:
        require(where, parts, "weight.nested_quant_map")
        codes, scales = parts["weight.absmax"], parts["weight.nested_absmax"]
        block = state.integer("nested_blocksize", REQUIRED)
        check(where, "weight.nested_absmax", scales, (-(-codes.shape[0] // block),), is_number=True)
        check(where, "weight.nested_quant_map", parts["weight.nested_quant_map"], (256,), is_number=True)
        table = parts["weight.nested_quant_map"].tensor.float()
        return NestedScales(codes, table, scales, block, state.number("nested_offset", REQUIRED, low=-1e30))
