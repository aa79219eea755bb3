"""Other people's four-bit matrices, GPTQ and AWQ, dequantized as they are read.

Both store a linear layer transposed, (in, out), as integers q of 4 bits, eight to an int32, with a scale and a
zero point for each group of inputs: w[i, o] = (q[i, o] - zero[group of i, o]) * scale[group of i, o].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .arrays import Array, Mapped
from .settings import Settings, shown
from .tensor_file import TensorFile
from .weight import CheckpointError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where outputs 0 to 7 lie among the eight of an int32


def unpack(packed: Tensor, dim: int) -> Tensor:
    """int32 of eight integers each, lowest bits first -> int32 with `dim` (0 or 1) eight times as long."""
    shifts = SHIFTS.view(8, 1) if dim == 0 else SHIFTS
    return ((packed.unsqueeze(dim + 1) >> shifts) & 15).flatten(dim, dim + 1)


@dataclass(frozen=True)
class FourBitMatrix(Array):
    """A linear layer's matrix (out, in) in four bits; `read` dequantizes it to float32."""

    qweight: Mapped
    qzeros: Mapped
    scales: Mapped
    g_idx: Mapped | None
    zero_offset: int = 0
    stored = "int4"
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scales.shape[1], self.num_inputs

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.qweight, self.qzeros, self.scales, self.g_idx) if part)

    @property
    def num_inputs(self) -> int:
        raise NotImplementedError

    def integers(self) -> Tensor:
        """q, int32 (in, out)"""
        raise NotImplementedError

    def zeros(self) -> Tensor:
        """Zero points, int32 (groups, out)"""
        raise NotImplementedError

    def groups(self) -> Tensor:
        """The group of each input, int64 (in,)"""
        num_groups = self.scales.shape[0]
        if self.g_idx is None:
            return torch.arange(self.num_inputs) // -(-self.num_inputs // num_groups)
        groups = self.g_idx.read(0, 0, self.num_inputs).long()
        if self.num_inputs and not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
            raise CheckpointError(f"g_idx names groups outside 0 to {num_groups - 1}")
        return groups

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        groups = self.groups()
        scales = self.scales.read(0, 0, self.scales.shape[0]).float()
        matrix = (self.integers() - self.zeros()[groups]) * scales[groups]
        return matrix.T.narrow(dim, start, stop - start).contiguous()


class GptqMatrix(FourBitMatrix):
    """AutoGPTQ's layout (arXiv:2210.17323): qweight (in / 8, out), qzeros (groups, out / 8), g_idx (in,).

    The format "gptq" stores each zero point less one (modulo 16), "gptq_v2" the zero point itself.
    """

    @property
    def num_inputs(self) -> int:
        return self.qweight.shape[0] * 8

    def integers(self) -> Tensor:
        return unpack(self.qweight.read(0, 0, self.qweight.shape[0]), 0)

    def zeros(self) -> Tensor:
        return (unpack(self.qzeros.read(0, 0, self.qzeros.shape[0]), 1) + self.zero_offset) & 15


class AwqMatrix(FourBitMatrix):
    """AutoAWQ's "gemm" layout (arXiv:2306.00978): qweight (in, out / 8), qzeros (groups, out / 8), interleaved."""

    @property
    def num_inputs(self) -> int:
        return self.qweight.shape[0]

    def integers(self) -> Tensor:
        return self._unpack(self.qweight)

    def zeros(self) -> Tensor:
        return self._unpack(self.qzeros)

    def _unpack(self, packed: Mapped) -> Tensor:
        in_order = unpack(packed.read(0, 0, packed.shape[0]), 1)
        return in_order.unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)


METHODS: dict[tuple[str, str], tuple[type[FourBitMatrix], int]] = {
    # (quant_method, format): the layout, and what its stored zero points lack
    ("gptq", "gptq"): (GptqMatrix, 1),
    ("gptq", "gptq_v2"): (GptqMatrix, 0),
    ("awq", "gemm"): (AwqMatrix, 0),
}


def stored_arrays(
    settings: Settings | None, files: Iterable[TensorFile]
) -> Iterator[tuple[str, Array, Path]]:
    """Every stored array as (name, array, file); the parts of a four-bit matrix become one `....weight`.

    `settings` is the model's quantization_config, None for a plain model. Raises CheckpointError for a method that
    is not supported and for parts that are missing or do not fit together.
    """
    method = None if settings is None else _method(settings)
    matrices: dict[str, dict[str, Mapped]] = {}
    places: dict[str, Path] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            module, _, part = name.rpartition(".")
            if part not in PARTS:
                yield name, Mapped(tensor, file.check), file.path
                continue
            matrices.setdefault(module, {})[part] = Mapped(tensor, file.check)
            places[module] = file.path
    for module, parts in matrices.items():
        if method is None:
            raise CheckpointError(
                f"{places[module]}: {module}: is in four bits, but no config names the method"
            )
        yield f"{module}.weight", _matrix(places[module], module, parts, method), places[module]


def _method(settings: Settings) -> tuple[type[FourBitMatrix], int]:
    method = (settings.text("quant_method") or "gptq").lower()
    default = "gemm" if method == "awq" else "gptq"
    named = (
        settings.text("checkpoint_format") or settings.text("format") or settings.text("version") or default
    )
    layout = METHODS.get((method, named.lower()))
    if layout is None:
        supported = ", ".join(" ".join(pair) for pair in METHODS)
        raise CheckpointError(
            f"{settings.file}: quantization {shown(method)} in format {shown(named)} is not supported; "
            f"{supported} are"
        )
    bits = settings.integer("bits", settings.integer("w_bit", 4))
    if bits != 4:
        raise settings.error("bits", bits, "only 4 are supported")
    return layout


def _matrix(
    file: Path, module: str, parts: dict[str, Mapped], method: tuple[type[FourBitMatrix], int]
) -> FourBitMatrix:
    layout, zero_offset = method
    missing = [part for part in PARTS[:3] if part not in parts]
    if missing:
        raise CheckpointError(f"{file}: {module}.{missing[0]}: is missing")
    for part, array in parts.items():
        if len(array.shape) != (1 if part == "g_idx" else 2):
            raise CheckpointError(f"{file}: {module}.{part}: has shape {list(array.shape)}")
    matrix = layout(*(parts.get(part) for part in PARTS), zero_offset=zero_offset)
    (outputs, inputs), num_groups = matrix.shape, matrix.scales.shape[0]
    expected = {
        "qweight": (inputs // 8, outputs) if layout is GptqMatrix else (inputs, outputs // 8),
        "qzeros": (num_groups, outputs // 8),
        "scales": (num_groups, outputs),
        "g_idx": (inputs,),
    }
    for part, array in parts.items():
        if array.shape != expected[part] or (part != "scales") == array.tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: {module}.{part}: is {array.stored} {list(array.shape)}, expected {list(expected[part])}"
            )
    if outputs % 8 or not num_groups or num_groups > inputs:
        raise CheckpointError(
            f"{file}: {module}: {num_groups} groups of {inputs} inputs by {outputs} outputs"
        )
    return matrix
