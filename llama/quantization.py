"""Low-bit weights: the formats as one table, and the linear that holds its weight in one of them.

`FORMATS[name].quantize` gives the published bytes (`llama/kernels/layouts.py` has the layouts and their sources); the
arithmetic is that of the published quantizers, in float32 and in their order, so that the bytes are equal too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.kernels import library, lowbit
from llama.kernels.layouts import LAYOUTS, Layout
from llama.linear import StoredWeight, in_tiles

NF4_MIDDLES = (
    *(-0.84809643, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018, 0.03979015),
    *(0.120255254, 0.20352125, 0.29201376, 0.38931254, 0.5016634, 0.6427869, 0.8614784),
)  # between neighbouring levels, as BigDL-LLM rounds them to float32: they decide ties

CHUNK = 1 << 20  # weights that are converted at a time: the temporaries stay small, and in the cache


class LowBitError(ValueError):
    """A weight, a format name or a split that the low-bit formats cannot serve."""


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in float32; 0 for 0, so that an all-zero block stays zero."""
    return torch.where(scale == 0, 0, 1 / scale)


def to_codes(values: Tensor, highest: int) -> Tensor:
    """Truncate to codes 0..highest, uint8. A scale so small that its reciprocal overflows gives code 0."""
    return values.nan_to_num(0, 0, 0).trunc().clamp(0, highest).to(torch.uint8)


def signed_peak(x: Tensor) -> Tensor:
    """(..., k) -> (..., 1): the value of largest magnitude, the first of equals, with its sign."""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))


def encode_symmetric(layout: Layout, x: Tensor) -> Tensor:
    """The value of largest magnitude gets the lowest code, exactly."""
    half = 2 ** (layout.bits - 1)
    scale = signed_peak(x) / -half
    return layout.pack(to_codes(x * reciprocal(scale) + (half + 0.5), 2 * half - 1), scale)


def encode_with_minimum(layout: Layout, x: Tensor) -> Tensor:
    """Codes count evenly from the block's minimum to its maximum."""
    highest = 2**layout.bits - 1
    minimum, maximum = x.aminmax(dim=-1, keepdim=True)
    scale = (maximum - minimum) / highest
    return layout.pack(to_codes((x - minimum) * reciprocal(scale) + 0.5, highest), scale, minimum)


def encode_with_zero(layout: Layout, x: Tensor) -> Tensor:
    """Even steps over a range that includes zero, which is one of the codes."""
    highest = 2**layout.bits - 1
    minimum, maximum = x.aminmax(dim=-1, keepdim=True)
    minimum = minimum.clamp(max=0)
    scale = ((maximum.clamp(min=0) - minimum) / highest).half().float()
    zero = to_codes(-minimum * reciprocal(scale) + 0.5, highest)
    return layout.pack(to_codes(x * reciprocal(scale) + zero + 0.5, highest), scale, zero)


def encode_int8(layout: Layout, x: Tensor) -> Tensor:
    """Rounded to the nearest of -127..127, halves away from zero."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    scaled = (x * reciprocal(scale)).nan_to_num(0, 0, 0)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = (whole + (2 * (magnitude - whole)).floor()).copysign(scaled)
    return layout.pack((rounded + 128).to(torch.uint8), scale)


def encode_nf4(layout: Layout, x: Tensor) -> Tensor:
    """The nearest level; code 0 throughout for an all-zero block."""
    scale = x.abs().amax(dim=-1, keepdim=True)
    scaled = torch.where(scale == 0, -1, x / scale)
    codes = torch.bucketize(scaled, torch.tensor(NF4_MIDDLES, device=x.device), out_int32=True)
    return layout.pack(codes.to(torch.uint8), scale)


def encode_q4_k(layout: Layout, x: Tensor) -> Tensor:
    """Even steps from each group's minimum (at most zero) to its maximum; not ggml's search for better ones."""
    x = x.unflatten(-1, (8, 32))
    minimum, maximum = x.aminmax(dim=-1)
    minimum = minimum.clamp(max=0)
    steps, units = zip(*(in_units((maximum - minimum) / 15, 63), in_units(-minimum, 63)), strict=True)
    scale, offset = ((step * unit.float()).unsqueeze(-1) for step, unit in zip(steps, units, strict=True))
    codes = to_codes((x + offset) * reciprocal(scale) + 0.5, 15)
    return layout.pack(codes, steps[0].to(torch.uint8), units[0], steps[1].to(torch.uint8), units[1])


def encode_q6_k(layout: Layout, x: Tensor) -> Tensor:
    """The value of largest magnitude in each group gets the lowest code; not ggml's search for better scales."""
    x = x.unflatten(-1, (16, 16))
    steps, unit = in_units(signed_peak(x).squeeze(-1) / -32, -128)
    codes = to_codes(x * reciprocal((steps * unit.float()).unsqueeze(-1)) + 32.5, 63)
    return layout.pack(codes, steps.to(torch.int8), unit)


def in_units(scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scales (n, k) as whole multiples, float32 (n, k), of one float16 (n, 1); the largest becomes `most`."""
    unit = (signed_peak(scales) / most).half()
    steps = (scales * reciprocal(unit.float())).round()
    return steps.clamp(min(most, 0), abs(most) - (most < 0)), unit


@dataclass(frozen=True)
class Format:
    """A low-bit format: its byte layout, and how numbers become those bytes."""

    layout: Layout
    encode: Callable[[Layout, Tensor], Tensor]  # float32 (n, block) -> uint8 (n, block_bytes)

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def block(self) -> int:
        """Columns of one row that are packed together."""
        return self.layout.block

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def packed_columns(self, in_features: int) -> int:
        """Bytes of one packed row. Raises LowBitError where whole blocks do not fill the row."""
        if in_features % self.block:
            raise LowBitError(
                f"{self.name} packs {self.block} columns at a time and {in_features} columns are not a multiple; "
                f"choose {allowed_formats(in_features)}"
            )
        return in_features // self.block * self.block_bytes

    def quantize(self, weight: Tensor) -> Tensor:
        """Pack (rows, columns) of any float dtype -> uint8 (rows, columns / block * block_bytes) on its device.

        Raises LowBitError for columns that are not whole blocks, and for numbers that are not finite or too large.
        """
        packed = weight.new_empty((weight.shape[0], self.packed_columns(weight.shape[1])), dtype=torch.uint8)
        for rows in row_chunks(*weight.shape):
            part = weight[rows].float()
            if not part.abs().amax() <= 65504:
                raise LowBitError(
                    f"{self.name} holds finite numbers up to 65504; the weight has others (NaN, infinity)"
                )
            packed[rows] = self.encode(self.layout, part.reshape(-1, self.block)).view(part.shape[0], -1)
        return packed

    def dequantize(self, packed: Tensor) -> Tensor:
        """Unpack uint8 (rows, bytes) -> float32 (rows, columns)."""
        num_rows, columns = packed.shape[0], packed.shape[1] // self.block_bytes * self.block
        weight = packed.new_empty((num_rows, columns), dtype=torch.float32)
        for rows in row_chunks(num_rows, columns):
            weight[rows] = self.layout.dequantize(packed[rows])
        return weight

    def split(self, packed: Tensor, dim: int, rank: int, world_size: int) -> Tensor:
        """This rank's rows (dim 0) or columns (dim 1) of packed uint8 (rows, bytes), a view.

        Raises LowBitError, naming the sizes that work, where rows or blocks do not divide by `world_size`.
        """
        count = packed.shape[0] if dim == 0 else packed.shape[1] // self.block_bytes
        if count % world_size:
            what = "rows" if dim == 0 else f"blocks of {self.block} columns"
            sizes = ", ".join(str(size) for size in range(1, 65) if count % size == 0)
            raise LowBitError(
                f"{self.name}: {count} {what} do not divide among {world_size} ranks; use one of {sizes}"
            )
        share = packed.shape[dim] // world_size
        return packed.narrow(dim, rank * share, share)


FORMATS: dict[str, Format] = {
    name: Format(LAYOUTS[name], encode)
    for name, encode in (
        ("sym_int4", encode_symmetric),
        ("asym_int4", encode_with_minimum),
        ("sym_int5", encode_symmetric),
        ("asym_int5", encode_with_minimum),
        ("sym_int8", encode_int8),
        ("zero_int4", encode_with_zero),
        ("nf4", encode_nf4),
        ("q4_0", encode_symmetric),
        ("q4_1", encode_with_minimum),
        ("q5_0", encode_symmetric),
        ("q5_1", encode_with_minimum),
        ("q8_0", encode_int8),
        ("q4_k", encode_q4_k),
        ("q6_k", encode_q6_k),
    )
}


def allowed_formats(in_features: int) -> str:
    """The formats whose blocks fill `in_features` columns, for an error's advice."""
    return (
        ", ".join(name for name, form in FORMATS.items() if in_features % form.block == 0)
        or "no low-bit format"
    )


def row_chunks(num_rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, about CHUNK weights each."""
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, num_rows, step))


def resolve_format(
    quantization: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    load_in_low_bit: str | None = None,
) -> str | None:
    """The format that a call asks for in any of its spellings; None for none.

    load_in_4bit is sym_int4, load_in_8bit sym_int8. Raises LowBitError for unknown names and for contradictions.
    """
    asked = [name.lower() for name in (quantization, load_in_low_bit) if name is not None]
    asked += ["sym_int4"] * load_in_4bit + ["sym_int8"] * load_in_8bit
    for name in asked:
        if name not in FORMATS:
            raise LowBitError(f"unknown quantization {name!r}; choose one of {', '.join(FORMATS)}")
    if len(set(asked)) > 1:
        raise LowBitError(f"asked for {' and '.join(dict.fromkeys(asked))} at once; give one quantization")
    return asked[0] if asked else None


Product = Callable[["LowBitLinear", Tensor], Tensor]  # (..., in_features) -> (..., out_features) in x's dtype


class LowBitLinear(nn.Module):
    """A linear layer whose weight stays packed: `weight` uint8 (out_features, bytes) in the published layout.

    `prepare` chooses how the product is made where the weight is: compiled kernels on a CPU, Triton's on a GPU, and
    PyTorch's operators where there is neither, which unpack some rows at a time. The compiled kernels need the weight
    rearranged, in place of the published layout; there is only ever one of the two. `plain`, and with it `state_dict`,
    always gives the published one. Inference only: no gradients.
    """

    def __init__(
        self,
        format: str,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.format = FORMATS[format]
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, self.format.packed_columns(in_features))
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self.product: Product = product_in_chunks
        self.fixed_rows: int | None = None
        self.variant = "auto"  # one of kernels.lowbit.variants(), to have every product computed in that way

    @classmethod
    def from_packed(cls, format: str, weight: Tensor, bias: Tensor | None = None) -> LowBitLinear:
        """Around a packed weight uint8 (rows, bytes), not copied. Raises LowBitError where its shape is impossible."""
        form = FORMATS[format]
        if weight.dim() != 2 or weight.dtype != torch.uint8 or weight.shape[1] % form.block_bytes:
            raise LowBitError(
                f"{format} needs uint8 (rows, a multiple of {form.block_bytes} bytes), "
                f"not {weight.dtype} {tuple(weight.shape)}"
            )
        linear = cls(format, weight.shape[1] // form.block_bytes * form.block, weight.shape[0], device="meta")
        linear.weight = weight
        linear.bias = None if bias is None else bias.float()
        return linear

    @classmethod
    def from_weight(cls, format: str, weight: Tensor, bias: Tensor | None = None) -> LowBitLinear:
        """Quantize a float weight (out_features, in_features)."""
        return cls.from_packed(format, FORMATS[format].quantize(weight), bias)

    @property
    def kind(self) -> str:
        """The format: linears of one format can be joined."""
        return self.format.name

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """`weight`, and `bias` where there is one, with their shapes in numbers."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        return shapes if self.bias is None else shapes | {"bias": (self.out_features,)}

    def load_weight(
        self, name: str, weight: StoredWeight, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Takes a stored weight or bias: its blocks as they are where they are of this format, else quantized."""
        if name == "bias":
            self.bias = weight.read().float().to(device)
            return
        is_ready = weight.format == self.format.name
        packed = weight.read_packed()[0] if is_ready else self.format.quantize(weight.read())
        self.weight = packed.to(device)

    def join(self, linears: Sequence[LowBitLinear]) -> LowBitLinear:
        """One linear over all their rows."""
        return join(linears)

    def join_in(self, joint: LowBitLinear) -> None:
        """Gives up the own weight, which `joint` now holds."""
        self.weight = self.weight.new_empty(0)

    @property
    def prepared(self) -> bool:
        """Whether the weight is in the compiled kernels' layout."""
        return self.product is compiled_product

    def prepare(self, fixed_rows: int | None = None) -> LowBitLinear:
        """Choose the fastest product, and give the weight the layout that it reads, at most one copy; returns self.

        With `fixed_rows` a row's result does not depend on the others: integer kernels see to that by themselves,
        other products are made in tiles of that many rows.
        """
        self.fixed_rows = fixed_rows
        integer = [variant for variant in lowbit.variants() if variant != "tiles"]
        if fixed_rows is not None and integer:
            self.variant = integer[0]
        if not self.prepared:
            self.product = fastest_product(self.weight.device)
            if self.prepared:
                self.weight = lowbit.interleave(self.weight, self.format.layout)
        return self

    def plain(self) -> Tensor:
        """The weight in the published layout, uint8 (out_features, bytes): a copy if prepared, else itself."""
        if not self.prepared:
            return self.weight
        return lowbit.deinterleave(self.weight, self.format.layout, self.out_features, self.in_features)

    def dequantize(self) -> Tensor:
        """The weight as float32 (out_features, in_features)."""
        return self.format.dequantize(self.plain())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in x's dtype."""
        if self.fixed_rows is None or self.prepared:
            return self.product(self, x)
        return in_tiles(partial(self.product, self), x, self.fixed_rows)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.plain()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if self.prepared and prefix + "weight" in state_dict:  # what arrives is in the published layout
            shape = (self.out_features, self.format.packed_columns(self.in_features))
            self.weight, self.product = self.weight.new_empty(shape), product_in_chunks
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.format.name}, in_features={self.in_features}, out_features={self.out_features}"


def compiled_product(linear: LowBitLinear, x: Tensor) -> Tensor:
    """By the C++ kernels, from their own layout."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return compiled_product(linear, x.float()).to(x.dtype)
    # not linear.weight: nn.Module looks among its buffers last, and a small model waits for such things
    stored = linear._buffers
    return lowbit.lowbit_linear(
        x, stored["weight"], stored["bias"], linear.format.name, linear.out_features, linear.variant
    )


def triton_product(linear: LowBitLinear, x: Tensor) -> Tensor:
    """By the Triton kernel, from the published layout."""
    from llama.kernels import cuda  # here, because Triton takes a moment to import and only a GPU needs it

    return cuda.packed_linear(x, linear.weight, linear.bias, linear.format.name)


def product_in_chunks(linear: LowBitLinear, x: Tensor) -> Tensor:
    """By PyTorch's operators, from the published layout; rounds the weight to x's dtype."""
    y = x.new_empty((*x.shape[:-1], linear.out_features))
    for part in row_chunks(linear.out_features, linear.in_features):
        weight = linear.format.layout.dequantize(linear.weight[part]).to(x.dtype)
        y[..., part] = F.linear(x, weight)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def fastest_product(device: torch.device) -> Product:
    """The product to use for weights on `device`."""
    if device.type == "cpu" and library.AVAILABLE:
        return compiled_product
    if device.type == "cuda" and find_spec("triton"):
        return triton_product
    return product_in_chunks


def has_kernels(device: torch.device | str) -> bool:
    """Whether products on `device` read packed weights as they are, so that keeping them packed costs no time."""
    return fastest_product(torch.device(device)) is not product_in_chunks


def join(linears: Sequence[LowBitLinear]) -> LowBitLinear:
    """One linear whose output is the given ones' outputs side by side; a copy of their packed rows.

    They share input width and format, and have all or none a bias; LowBitError otherwise.
    """
    kinds = {(linear.format.name, linear.in_features, linear.bias is None) for linear in linears}
    if len(kinds) != 1:
        raise LowBitError(
            f"linears to join must agree in format, input width and having a bias; got {sorted(kinds)}"
        )
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return LowBitLinear.from_packed(
        linears[0].format.name, torch.cat([linear.plain() for linear in linears]), bias
    )


def replace_linears(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Puts a LowBitLinear in the place of each linear of `model` (on the meta device) that `formats` names.

    formats: module name ("layers.0.attention.wq") -> format. Raises LowBitError, with the formats that would do, where
    a rank's columns are not whole blocks.
    """
    for name, format in formats.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        linear = getattr(owner, attribute)
        bias = linear.bias is not None
        setattr(
            owner,
            attribute,
            LowBitLinear(format, linear.in_features, linear.out_features, bias, device="meta"),
        )
