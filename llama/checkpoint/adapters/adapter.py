"""What an adapter's files say: matrices of low rank, and whole weights, by the names of the model that they change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...files.errors import CheckpointError
from ...model import ModelArgs
from ..arrays import Array, Mapped
from ..inventory import BIASES, EMBEDDING, OUTPUT, expected_shapes, interleave, is_rotary, module_of


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix W: scale * b @ a. With magnitudes (DoRA) the sum's outputs get these lengths.

    An output is a row, but of an embedding a column. LoRA: Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024,
    arXiv:2402.09353.
    """

    a: Tensor  # (rank, columns)
    b: Tensor  # (rows, rank)
    scale: float
    magnitude: Tensor | None = None  # (outputs,)
    bias: Tensor | None = None  # (rows,): added to the layer's bias, scaled as b is
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def delta(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """That part of scale * b @ a, float32."""
        return (self.b[rows].float() * self.scale) @ self.a[:, columns].float()

    def reordered(self, head_dim: int) -> LowRank:
        """The same with its rows in Meta's rotary order."""

        def reorder(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else interleave(rows, head_dim).flatten(0, 2)

        return replace(self, b=reorder(self.b), magnitude=reorder(self.magnitude), bias=reorder(self.bias))

    def tensors(self) -> Iterator[Tensor]:
        yield from (one for one in (self.a, self.b, self.magnitude, self.bias) if one is not None)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. Names are canonical as far as the model's family knows them; `fitted` says which are not."""

    path: Path
    format: str  # "peft" or "gguf"
    files: tuple[Path, ...]  # of which its content is made; the last one holds the weights
    low_rank: dict[str, LowRank]  # by module: "layers.0.attention.wq"
    whole: dict[str, Array] = field(default_factory=dict)  # by weight: what takes the place of the model's own
    base: str | None = None  # the model that it was made for, in its maker's words
    is_half_split: bool = True  # whether rotary rows are in Hugging Face's order
    tokenizer_path: Path | None = None  # where it brings a vocabulary of its own
    weight: float = 1.0  # how strong it was made
    unknown_keys: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return self.files[-1]

    @cached_property
    def digest(self) -> bytes:
        """A sha256 over the files' content: adapters that are equal by it compute the same keys and values."""
        digest = hashlib.sha256(str(self.weight).encode())
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.digest()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for low_rank in self.low_rank.values() for tensor in low_rank.tensors())

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({low_rank.rank for low_rank in self.low_rank.values()}))

    @property
    def is_sum(self) -> bool:
        """Whether all that it does is to add something: then it can be weighted, and stand beside another one."""
        return not self._fixed()

    def _fixed(self) -> list[str]:
        return [*self.whole, *(name for name, one in self.low_rank.items() if one.magnitude is not None)]

    def weighted(self, weight: float) -> Adapter:
        """The same, as strong as `weight` says. Raises CheckpointError where it holds what has no half."""
        if weight == 1:
            return self
        for fixed in self._fixed():
            raise CheckpointError(
                f"{self.path}: {fixed}: has no part that could be weighted by {weight:g}: whole weights and DoRA's "
                "magnitudes are taken as they are"
            )
        return replace(
            self,
            weight=self.weight * weight,
            low_rank={
                name: replace(one, scale=one.scale * weight, bias=None if one.bias is None else one.bias * weight)
                for name, one in self.low_rank.items()
            },
        )

    def fitted(self, args: ModelArgs) -> Adapter:
        """The same for a model of this shape, in its rotary order.

        Raises CheckpointError for modules that such a model has not, and for other shapes. The vocabulary alone may
        be another one: where the embedding is whole, its rows say how large it is.
        """
        args = replace(args, tie_word_embeddings=False, **dict.fromkeys(BIASES, True))
        rows = {self.whole[name].shape[0] for name in (EMBEDDING, OUTPUT) if name in self.whole}
        if len(rows) > 1:
            raise CheckpointError(f"{self.file}: embedding and output layer have {sorted(rows)} rows: they must agree")
        shapes = dict(expected_shapes(replace(args, vocab_size=rows.pop() if rows else args.vocab_size)))
        low_rank, whole = dict(self.low_rank), dict(self.whole)
        for name, one in self.low_rank.items():
            self._validate(name, one.shape, shapes.get(f"{name}.weight"))
            if self.is_half_split and is_rotary(f"{name}.weight"):
                low_rank[name] = one.reordered(args.head_dim)
            if one.bias is not None and (module := module_of(f"{name}.weight")) and module.bias is None:
                raise CheckpointError(f"{self.file}: {name}: has a lora_bias, which this layer cannot have")
        for name, array in self.whole.items():
            self._validate(name, array.shape, shapes.get(name))
            if self.is_half_split and is_rotary(name):
                whole[name] = array.reordered(args.head_dim, interleave)
        return replace(self, low_rank=low_rank, whole=whole, is_half_split=False)

    def _validate(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
        if expected is None:
            raise CheckpointError(f"{self.file}: {name}: the base model has no such module")
        if tuple(shape) != expected:
            raise CheckpointError(
                f"{self.file}: {name}: is for a matrix of {list(shape)}, but the base model's has {list(expected)}: "
                "was it made for another model?"
            )


def low_rank_of(file: Path, name: str, parts: dict[str, Tensor], alpha: float | None, root: bool = False) -> LowRank:
    """A LowRank of its stored parts: "a", "b", "magnitude", "bias".

    The scale is alpha / rank, or with `root` alpha / sqrt(rank) (rslora), and 1 without an alpha. Raises
    CheckpointError for parts that do not belong together.
    """
    for part in ("a", "b"):
        if part not in parts:
            raise CheckpointError(f"{file}: {name}: lora_{part.upper()} is missing")
    for tensor in parts.values():
        if not (tensor.is_floating_point() and tensor.dtype.itemsize > 1):
            raise CheckpointError(f"{file}: {name}: holds {tensor.dtype}, but numbers of 16 bits or more are needed")
    a, b = parts["a"], parts["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(f"{file}: {name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not share a rank")
    rank = a.shape[0]
    if rank == 0:
        raise CheckpointError(f"{file}: {name}: has a rank of 0; at least 1 is needed")
    scale = 1.0 if alpha is None else alpha / (rank**0.5 if root else rank)
    magnitude, bias = parts.get("magnitude"), parts.get("bias")
    is_embedding = f"{name}.weight" == EMBEDDING
    outputs = a.shape[1] if is_embedding else b.shape[0]
    for one in (magnitude, bias):
        if one is not None and one.numel() != outputs:
            raise CheckpointError(f"{file}: {name}: {one.numel()} numbers beside {outputs} outputs")
    if magnitude is not None and bias is not None:
        raise CheckpointError(f"{file}: {name}: DoRA with a lora_bias is not supported")
    return LowRank(
        a,
        b,
        scale,
        None if magnitude is None else magnitude.reshape(-1),
        None if bias is None else bias.reshape(-1).float() * scale,
        is_embedding,
    )


def whole_of(file: Path, name: str, tensor: Tensor, check: Callable[[], None]) -> Array:
    """A whole weight as an array. Raises CheckpointError for what is no matrix or vector of numbers."""
    if tensor.ndim not in (1, 2) or not (tensor.is_floating_point() and tensor.dtype.itemsize > 1):
        raise CheckpointError(f"{file}: {name}: {tensor.dtype} {list(tensor.shape)} is no weight of a model")
    return Mapped(tensor, check)
