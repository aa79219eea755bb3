"""Other people's four-bit matrices, GPTQ and AWQ, in our blocks where they fit, else dequantized as they are read.

Both store a linear layer transposed, (in, out), as integers q of 4 bits, eight to an int32, with a scale and a
zero point for each group of inputs: w[i, o] = (q[i, o] - zero[group of i, o]) * scale[group of i, o].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...files.errors import CheckpointError, shown
from ...files.json import read_json
from ...files.tensor_file import TensorFile
from ...kernels.formats import FORMATS, row_chunks
from ...model import ModelArgs
from ..arrays import Array, Mapped
from ..opened import Checkpoint
from ..settings import Settings
from .huggingface import StoredArray, config_settings, is_huggingface, open_huggingface
from .lowbit import LowBitMatrix

SECTION, BESIDE = "quantization_config", "quantize_config.json"  # in config.json, or a file of its own
PARTS = ("qweight", "qzeros", "scales", "g_idx")
ZERO_INT4 = FORMATS["zero_int4"]
AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where outputs 0 to 7 lie among the eight of an int32


def unpack(packed: Tensor, dim: int) -> Tensor:
    """int32 (n, m) of eight integers each, lowest bits first -> uint8 with `dim` (0 or 1) eight times as long."""
    pairs = packed.contiguous().view(torch.uint8).view(*packed.shape, 4)  # bytes, the lowest first
    integers = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(2)
    return (integers.transpose(1, 2) if dim == 0 else integers).flatten(dim, dim + 1)


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

    def integers(self, start: int, stop: int) -> Tensor:
        """q of the inputs `start` to `stop`, multiples of 8: uint8 (inputs, out)"""
        raise NotImplementedError

    def zeros(self) -> Tensor:
        """Zero points, uint8 (groups, out)"""
        raise NotImplementedError

    def groups(self) -> Tensor:
        """The group of each input, int64 (in,)"""
        if self.g_idx is None:
            return torch.arange(self.num_inputs) // -(-self.num_inputs // self.scales.shape[0])
        return self.g_idx.read(0, 0, self.num_inputs).long()

    def fits_blocks(self) -> bool:
        """Whether the inputs of every block are in one group, and float16 holds the scales.

        It is not so where inputs were reordered by their importance ("act order"), or groups are smaller than blocks.
        """
        groups = self.groups()
        if not torch.equal(groups, groups[:: ZERO_INT4.block].repeat_interleave(ZERO_INT4.block)):
            return False
        if self.scales.dtype == torch.float16:
            return True
        scales = self.scales.read(0, 0, self.scales.shape[0])
        return torch.equal(scales.half().to(scales.dtype), scales)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        groups = self.groups()
        scales = self.scales.read(0, 0, self.scales.shape[0]).float()
        matrix = (self.integers(0, self.num_inputs).float() - self.zeros()[groups]) * scales[groups]
        return matrix.T.narrow(dim, start, stop - start).contiguous()


class GptqMatrix(FourBitMatrix):
    """AutoGPTQ's layout (arXiv:2210.17323): qweight (in / 8, out), qzeros (groups, out / 8), g_idx (in,).

    The format "gptq" stores each zero point less one (modulo 16), "gptq_v2" the zero point itself.
    """

    @property
    def num_inputs(self) -> int:
        return self.qweight.shape[0] * 8

    def integers(self, start: int, stop: int) -> Tensor:
        return unpack(self.qweight.read(0, start // 8, stop // 8), 0)

    def zeros(self) -> Tensor:
        return (unpack(self.qzeros.read(0, 0, self.qzeros.shape[0]), 1) + self.zero_offset) & 15


class AwqMatrix(FourBitMatrix):
    """AutoAWQ's "gemm" layout (arXiv:2306.00978): qweight (in, out / 8), qzeros (groups, out / 8), interleaved."""

    @property
    def num_inputs(self) -> int:
        return self.qweight.shape[0]

    def integers(self, start: int, stop: int) -> Tensor:
        return self._unpack(self.qweight.read(0, start, stop))

    def zeros(self) -> Tensor:
        return self._unpack(self.qzeros.read(0, 0, self.qzeros.shape[0]))

    def _unpack(self, packed: Tensor) -> Tensor:
        return unpack(packed, 1).unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)


@dataclass(frozen=True)
class FourBitBlocks(Array):
    """A matrix that fits into blocks, converted as it is read, some blocks at a time: uint8 (out, bytes of a row)."""

    matrix: FourBitMatrix
    dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, inputs = self.matrix.shape
        return outputs, ZERO_INT4.packed_columns(inputs)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        rows, columns = (slice(start, stop) if dim == axis else slice(0, self.shape[axis]) for axis in (0, 1))
        blocks = range(columns.start // ZERO_INT4.block_bytes, columns.stop // ZERO_INT4.block_bytes)
        groups = self.matrix.groups()[:: ZERO_INT4.block]
        scales, zeros = self.matrix.scales.read(0, 0, self.matrix.scales.shape[0]), self.matrix.zeros()
        out = torch.empty((rows.stop - rows.start, len(blocks), ZERO_INT4.block_bytes), dtype=torch.uint8)
        for part in row_chunks(len(blocks), ZERO_INT4.block * self.shape[0]):
            some = blocks[part]
            codes = self.matrix.integers(some.start * ZERO_INT4.block, some.stop * ZERO_INT4.block)
            group = groups[some.start : some.stop]
            fields = codes.unflatten(0, (-1, ZERO_INT4.block)), scales[group, None], zeros[group, None]
            # each (blocks, values, out) -> (out * blocks, values)
            by_row = (field[..., rows].permute(2, 0, 1).flatten(0, 1) for field in fields)
            out[:, part] = ZERO_INT4.pack(*by_row).view(len(out), len(some), ZERO_INT4.block_bytes)
        return out.flatten(1)


class FourBitPacked(LowBitMatrix):
    """Such a matrix as a weight that can stay packed."""

    stored = FourBitMatrix.stored


METHODS: dict[tuple[str, str], tuple[type[FourBitMatrix], int]] = {
    # (quant_method, format): the layout, and what its stored zero points lack
    ("gptq", "gptq"): (GptqMatrix, 1),
    ("gptq", "gptq_v2"): (GptqMatrix, 0),
    ("awq", "gemm"): (AwqMatrix, 0),
}


def is_gptq(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory that says how its matrices were quantized, in either of two places."""
    if not is_huggingface(path):
        return False
    return config_settings(path).values.get(SECTION) is not None or (path / BESIDE).is_file()


def open_gptq(path: Path) -> Checkpoint:
    """Opens a directory whose matrices are in four bits, GPTQ's or AWQ's."""
    return open_huggingface(path, _arrays)


def _arrays(settings: Settings, args: ModelArgs, files: list[TensorFile]) -> Iterator[StoredArray]:
    """Every stored array; the parts of a four-bit matrix become one `....weight`.

    Of a matrix's parts the small ones are read, to see whether it fits into blocks. Raises CheckpointError for a method
    that is not supported and for parts that are missing or do not fit together.
    """
    beside = settings.file.with_name(BESIDE)
    method = _method(settings.section(SECTION) or Settings(read_json(beside), beside))
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
        matrix = _matrix(places[module], module, parts, method)
        packed = FourBitPacked(FourBitBlocks(matrix), ZERO_INT4) if matrix.fits_blocks() else matrix
        yield f"{module}.weight", packed, places[module]


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
    groups = matrix.groups()
    if not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
        raise CheckpointError(f"{file}: {module}: g_idx names groups outside 0 to {num_groups - 1}")
    return matrix
