"""The linear that holds its weight in a low-bit format, and how low-bit modules take the place of plain ones.

`FORMATS` (`llama/kernels/formats.py`) is the table of formats: `FORMATS[name].quantize` gives the published bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.embedding import Embedding, LowBitEmbedding
from llama.kernels import library, lowbit
from llama.kernels.cuda import has_triton
from llama.kernels.formats import FORMATS, LowBitError, LowBitFormat, row_chunks
from llama.kernels.layer import LayerProduct
from llama.linear import CountedModule, StoredWeight, in_tiles


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


class LowBitLinear(CountedModule):
    """A linear layer whose weight stays packed: `weight` uint8 (out_features, bytes) in the published layout.

    `prepare` chooses how the product is made where the weight is: compiled kernels on a CPU, Triton's on a GPU, and
    PyTorch's operators where there is neither, which unpack some rows at a time. Kernels need the weight rearranged, in
    place of the published layout; there is only ever one of the two. `plain`, and with it `state_dict`, always gives
    the published one. Inference only: no gradients.
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
        self.format: LowBitFormat = FORMATS[format]
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, self.format.packed_columns(in_features))
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self.product: Product = product_in_chunks
        self.fixed_rows: int | None = None
        self.joined: tuple[LowBitLinear, slice] | None = None  # what holds the weight, and where; no child of this
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

    def load_weight(self, name: str, weight: StoredWeight, device: torch.device, dtype: torch.dtype | None) -> None:
        """Takes a stored weight or bias: its blocks as they are where they are of this format, else quantized."""
        if name == "bias":
            self.bias = weight.read().float().to(device)
            return
        is_ready = weight.format == self.format.name
        packed = weight.read_packed()[0] if is_ready else self.format.quantize(weight.read())
        self.weight = packed.to(device)

    @classmethod
    def join(cls, linears: Sequence[LowBitLinear]) -> LowBitLinear:
        """One linear whose output is the given ones' outputs side by side; a copy of their packed rows, arranged.

        They share input width and format, and have all or none a bias; LowBitError otherwise.
        """
        kinds = {(linear.kind, linear.in_features, linear.bias is None) for linear in linears}
        if len(kinds) != 1:
            raise LowBitError(
                f"linears to join must agree in format, input width and having a bias; got {sorted(kinds)}"
            )
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        outputs = sum(linear.out_features for linear in linears)
        joint = cls(linears[0].kind, linears[0].in_features, outputs, device="meta")
        joint.bias = bias
        joint._arrange([linear.plain() for linear in linears])
        return joint

    def join_in(self, joint: LowBitLinear, rows: slice) -> None:
        """Gives up the own weight, which `joint` now holds: a view of it, or nothing where that is rearranged."""
        if joint.arranged:
            self.weight, self.joined = self.weight.new_empty(0), (joint, rows)
        else:
            self.weight = joint.weight[rows]
        if self.bias is not None:
            self.bias = joint.bias[rows]

    @property
    def prepared(self) -> bool:
        """Whether the weight is in the compiled kernels' layout."""
        return self.product is compiled_product

    @property
    def arranged(self) -> bool:
        """Whether the weight is in a layout of its product's own, and not in the published one."""
        return self.product in LAYOUTS

    def for_layer(self) -> LayerProduct | None:
        """See `AnyLinear.for_layer`; None too where a variant of the kernels is asked for."""
        if not self.prepared or self.variant != "auto":
            return None
        # not self.weight: nn.Module looks among its buffers last, and a small model waits for such things
        stored = self._buffers
        return LayerProduct(stored["weight"], stored["bias"], self.format.name, self.out_features)

    def prepare(self, fixed_rows: int | None = None) -> LowBitLinear:
        """Choose the fastest product, and give the weight the layout that it reads, at most one copy; returns self.

        With `fixed_rows` a row's result does not depend on the others: integer kernels see to that by themselves,
        other products are made in tiles of that many rows.
        """
        self.fixed_rows = fixed_rows
        if not self.arranged:
            self._arrange([self.weight])
        if fixed_rows is not None and self.prepared:
            self.variant = library.instruction_sets()[0]
        return self

    def _arrange(self, parts: list[Tensor]) -> None:
        """Takes a weight in parts, rows below rows in the published layout, as the fastest product reads it."""
        self.product = fastest_product(self.format, parts[0].device)
        if self.arranged:
            self.weight = LAYOUTS[self.product].arrange(parts, self.format)
        else:
            self.weight = parts[0] if len(parts) == 1 else torch.cat(parts)

    def plain(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight in the published layout, uint8 (rows, bytes): a copy if rearranged, else a view."""
        if self.joined is not None:
            joint, of_joint = self.joined
            return joint.plain(of_joint)[rows]
        return LAYOUTS[self.product].published(self, rows) if self.arranged else self.weight[rows]

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

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.arranged and prefix + "weight" in state_dict:  # what arrives is in the published layout
            shape = (self.out_features, self.format.packed_columns(self.in_features))
            self.weight, self.product = self.weight.new_empty(shape), product_in_chunks
        if self.joined is not None:
            args[-1].append(f"{prefix}weight is part of a joint product; weights are loaded before `prepare`")
            return
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
    """By the Triton kernels, from their own layout."""
    from llama.kernels.cuda import lowbit as gpu  # here, because Triton takes a moment to import

    return gpu.packed_linear(x, linear.weight, linear.bias, linear.format.name)


@dataclass(frozen=True)
class Layout:
    """How a product wants its weight, where that is not the published layout."""

    arrange: Callable[[list[Tensor], LowBitFormat], Tensor]  # of parts in the published one, rows below rows
    published: Callable[[LowBitLinear, slice], Tensor]  # rows of a linear's weight as they were, a copy


def tiles_as_published(linear: LowBitLinear, rows: slice) -> Tensor:
    return lowbit.from_tiles(linear.weight, linear.format, linear.out_features, linear.in_features, rows)


def words_of(parts: list[Tensor], form: LowBitFormat) -> Tensor:
    from llama.kernels.cuda import lowbit as gpu

    return gpu.to_words(parts, form)


def words_as_published(linear: LowBitLinear, rows: slice) -> Tensor:
    from llama.kernels.cuda import lowbit as gpu

    return gpu.from_words(linear.weight, linear.format, rows)


LAYOUTS: dict[Product, Layout] = {
    compiled_product: Layout(lowbit.to_tiles, tiles_as_published),
    triton_product: Layout(words_of, words_as_published),
}


def product_in_chunks(linear: LowBitLinear, x: Tensor) -> Tensor:
    """By PyTorch's operators, from the published layout; rounds the weight to x's dtype."""
    y = x.new_empty((*x.shape[:-1], linear.out_features))
    for part in row_chunks(linear.out_features, linear.in_features):
        weight = linear.format.dequantize(linear.weight[part]).to(x.dtype)
        y[..., part] = F.linear(x, weight)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def fastest_product(form: LowBitFormat, device: torch.device) -> Product:
    """The product to use for weights of a format on `device`."""
    if device.type == "cpu" and form.name in library.formats():
        return compiled_product
    if device.type == "cuda" and form.triton and has_triton():
        return triton_product
    return product_in_chunks


def has_kernels(format: str, device: torch.device | str) -> bool:
    """Whether products on `device` read a format's weights as they are, so that keeping them packed costs no time."""
    return fastest_product(FORMATS[format], torch.device(device)) is not product_in_chunks


def pack_modules(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Puts a low-bit module in the place of each linear, or embedding, of `model` (on the meta device) in `formats`.

    formats: module name ("layers.0.attention.wq") -> format; those of other stages are passed over. Raises LowBitError,
    with the formats that would do, where a rank's columns are not whole blocks.
    """
    held = {name for name, _ in model.named_modules()}
    for name, format in formats.items():
        if name not in held:
            continue
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        plain = getattr(owner, attribute)
        with torch.device("meta"):
            if isinstance(plain, Embedding):
                packed = LowBitEmbedding(format, plain.vocab_size, plain.dim, plain.parallel)
            else:
                packed = LowBitLinear(format, plain.in_features, plain.out_features, plain.bias is not None)
        setattr(owner, attribute, packed)
