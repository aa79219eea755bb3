"""GPTQ and AWQ: both store a matrix transposed, (in, out), as integers q of a few bits, packed into int32.

A scale and a zero point belong to each group of inputs:

    w[i, o] = (q[i, o] - zero[group of i, o]) * scale[group of i, o]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...files.errors import CheckpointError, shown
from ...kernels.formats import FORMATS, LowBitFormat
from ..arrays import Array, Mapped
from ..settings import Settings
from .method import Method, Parts, QuantizedMatrix, Where, are_halves, check, packable, require, unpack

AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where outputs 0 to 7 lie among the eight of an int32


@dataclass(frozen=True)
class GroupedMatrix(QuantizedMatrix):
    """Integers with a scale and a zero point for each group of inputs."""

    qweight: Mapped
    qzeros: Mapped
    scales: Mapped  # (groups, out)
    g_idx: Mapped | None
    bits: int
    by_inputs: ClassVar[bool] = True

    @property
    def stored(self) -> str:
        return f"int{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scales.shape[1], self.num_inputs

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.qweight, self.qzeros, self.scales, self.g_idx) if part)

    @property
    def num_inputs(self) -> int:
        raise NotImplementedError

    def integers(self, start: int, stop: int) -> Tensor:
        """q of the inputs `start` to `stop`, multiples of 32: uint8 (inputs, out)"""
        raise NotImplementedError

    def zeros(self) -> Tensor:
        """Zero points, uint8 (groups, out)"""
        raise NotImplementedError

    def groups(self) -> Tensor:
        """The group of each input, int64 (in,)"""
        if self.g_idx is None:
            return torch.arange(self.num_inputs) // -(-self.num_inputs // self.scales.shape[0])
        return self.g_idx.read(0, 0, self.num_inputs).long()

    def fitting(self) -> LowBitFormat | None:
        """The format of ours that holds the same numbers; None where there is none.

        There is none where inputs were reordered by their importance ("act order"), groups are smaller than blocks,
        float16 does not hold the scales, or the zero points of 8 bits differ from their middle.
        """
        form = {4: FORMATS["zero_int4"], 8: FORMATS["sym_int8"]}.get(self.bits)
        if form is None or self.num_inputs % form.block:
            return None
        groups = self.groups()
        if not torch.equal(groups, groups[:: form.block].repeat_interleave(form.block)):
            return None
        fits = are_halves(self.scales) if self.bits == 4 else bool((self.zeros() == 128).all())
        return form if fits else None

    def fields(self, rows: slice, columns: slice, form: LowBitFormat) -> tuple[Tensor, ...]:
        codes = self.integers(columns.start, columns.stop)[:, rows].T
        group = self.groups()[columns][:: form.block]
        scales = self.scales.read(0, 0, self.scales.shape[0])[group][:, rows].T.unsqueeze(-1)
        fields = codes.unflatten(1, (-1, form.block)), scales.float()
        return fields if self.bits == 8 else (*fields, self.zeros()[group][:, rows].T.unsqueeze(-1))

    def values(self, rows: slice) -> Tensor:
        groups = self.groups()
        scales = self.scales.read(0, 0, self.scales.shape[0])[:, rows].float()
        integers = self.integers(0, self.num_inputs)[:, rows].float()
        return ((integers - self.zeros()[:, rows][groups]) * scales[groups]).T


@dataclass(frozen=True)
class GptqMatrix(GroupedMatrix):
    """qweight (in * bits / 32, out), qzeros (groups, out * bits / 32), g_idx (in,)"""

    zero_offset: int

    @property
    def num_inputs(self) -> int:
        return self.qweight.shape[0] * 32 // self.bits

    def integers(self, start: int, stop: int) -> Tensor:
        words = self.qweight.read(0, start * self.bits // 32, stop * self.bits // 32)
        return unpack(words.T, self.bits).T

    def zeros(self) -> Tensor:
        words = self.qzeros.read(0, 0, self.qzeros.shape[0])
        return (unpack(words, self.bits) + self.zero_offset) & (1 << self.bits) - 1


class AwqMatrix(GroupedMatrix):
    """qweight (in, out / 8), qzeros (groups, out / 8), the eight of an int32 interleaved"""

    @property
    def num_inputs(self) -> int:
        return self.qweight.shape[0]

    def integers(self, start: int, stop: int) -> Tensor:
        return self._unpack(self.qweight.read(0, start, stop))

    def zeros(self) -> Tensor:
        return self._unpack(self.qzeros.read(0, 0, self.qzeros.shape[0]))

    def _unpack(self, packed: Tensor) -> Tensor:
        return unpack(packed, 4).unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)


class Gptq(Method):
    """AutoGPTQ's layout (arXiv:2210.17323), and its successors'.

    The format "gptq" stores each zero point less one (modulo 2 ** bits), "gptq_v2" the zero point itself.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")
    name = "gptq"
    zero_offsets: ClassVar[dict[str, int]] = {"gptq": 1, "gptq_v2": 0}
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def __init__(self, settings: Settings) -> None:
        self.zero_offset = self.zero_offsets[self._variant(settings, tuple(self.zero_offsets))]
        self.bits = self._bits(settings)

    def _variant(self, settings: Settings, known: tuple[str, ...]) -> str:
        keys = ("checkpoint_format", "format", "version")
        variant = next(filter(None, map(settings.text, keys)), known[0]).lower()
        if variant not in known:
            raise CheckpointError(
                f"{settings.file}: quantization {shown(self.name)} in format {shown(variant)} is not supported; "
                f"{' and '.join(known)} are"
            )
        return variant

    def _bits(self, settings: Settings) -> int:
        bits = settings.integer("bits", settings.integer("w_bit", 4))
        if bits not in self.widths:
            raise settings.error("bits", bits, f"{', '.join(map(str, self.widths))} can be read")
        return bits

    def matrix(self, where: Where, parts: Parts) -> Array:
        require(where, parts, *self.parts[:3])
        for part, array in parts.items():
            if len(array.shape) != (1 if part == "g_idx" else 2):
                raise CheckpointError(f"{where}.{part}: has shape {list(array.shape)}")
        matrix, expected = self._matrix(*(parts.get(part) for part in self.parts))
        (outputs, inputs), num_groups = matrix.shape, matrix.scales.shape[0]
        expected |= {"scales": (num_groups, outputs), "g_idx": (inputs,)}
        for part, array in parts.items():
            check(where, part, array, expected[part], is_number=part == "scales")
        if outputs * self.bits % 32 or not num_groups or num_groups > inputs:
            raise CheckpointError(f"{where}: {num_groups} groups of {inputs} inputs by {outputs} outputs")
        groups = matrix.groups()
        if not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
            raise CheckpointError(f"{where}: g_idx names groups outside 0 to {num_groups - 1}")
        form = matrix.fitting()
        return matrix if form is None else packable(matrix, form)

    def _matrix(
        self, qweight: Mapped, qzeros: Mapped, scales: Mapped, g_idx: Mapped | None
    ) -> tuple[GroupedMatrix, dict[str, tuple[int, ...]]]:
        """The matrix, not checked, and the shapes that its packed parts must have."""
        matrix = GptqMatrix(qweight, qzeros, scales, g_idx, self.bits, self.zero_offset)
        (outputs, inputs), bits = matrix.shape, self.bits
        packed = outputs * bits // 32
        return matrix, {"qweight": (inputs * bits // 32, outputs), "qzeros": (scales.shape[0], packed)}


class Awq(Gptq):
    """AutoAWQ's layout "gemm" (arXiv:2306.00978)."""

    name = "awq"
    widths: ClassVar[tuple[int, ...]] = (4,)

    def __init__(self, settings: Settings) -> None:
        self._variant(settings, ("gemm",))
        self.bits = self._bits(settings)

    def _matrix(
        self, qweight: Mapped, qzeros: Mapped, scales: Mapped, g_idx: Mapped | None
    ) -> tuple[GroupedMatrix, dict[str, tuple[int, ...]]]:
        matrix = AwqMatrix(qweight, qzeros, scales, g_idx, self.bits)
        packed = matrix.shape[0] // 8
        return matrix, {"qweight": (matrix.num_inputs, packed), "qzeros": (scales.shape[0], packed)}
