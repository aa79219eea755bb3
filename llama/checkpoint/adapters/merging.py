"""An adapter merged into its base model: a checkpoint whose weights are the sums, made as they are read.

It stands between reading and casting, so that loading, ranks, quantizing and every format that is written have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...files.errors import CheckpointError
from ...kernels.formats import row_chunks
from ..arrays import Array, Mapped, Wrapped, read_by_copy
from ..inventory import BIASES, EMBEDDING, OUTPUT, expected_shapes, module_of
from ..opened import Checkpoint, is_tied
from ..packing import untied
from ..weight import Weight
from .adapter import Adapter, LowRank


@dataclass(frozen=True)
class Merged(Wrapped):
    """A matrix with an adapter's change: the sum is made in float32 and rounded once. Blocks become numbers."""

    change: LowRank

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        return read_by_copy(self, dim, start, stop)

    def copy_to(self, out: Tensor, dim: int, start: int, stop: int) -> None:
        if dim == 0:
            for part in row_chunks(stop - start, self.shape[1]):
                place = out[part]
                place.copy_(self._rows(start + part.start, start + part.start + len(place)))
        elif self.change.magnitude is None:
            out.copy_(self.array.read(1, start, stop).float() + self.change.delta(columns=slice(start, stop)))
        else:  # a row's length wants all its columns
            for part in row_chunks(*self.shape):
                place = out[part]
                place.copy_(self._rows(part.start, part.start + len(place))[:, start:stop])

    def _rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        total = self.array.read(0, start, stop).float() + self.change.delta(rows)
        if self.change.magnitude is None:
            return total
        return total * (self.change.magnitude[rows].float() / total.norm(dim=1)).unsqueeze(1)


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter in it: its vocabulary, tokenizer and chat template too, where it brings them.

    Nothing is read but vectors. Raises CheckpointError where the two do not belong together.
    """
    if not checkpoint.has_head and (OUTPUT in adapter.whole or "output" in adapter.low_rank):
        raise CheckpointError(f"{adapter.file}: output: the base model has no output layer")
    adapter = adapter.fitted(checkpoint.args)
    whole = dict(adapter.whole)
    base = _untied_for(checkpoint, adapter)
    embedding = whole.get(EMBEDDING)
    vocab_size = checkpoint.args.vocab_size if embedding is None else embedding.shape[0]
    is_resized = vocab_size != checkpoint.args.vocab_size or (
        OUTPUT in whole and whole[OUTPUT].shape[0] != checkpoint.args.vocab_size
    )
    if is_resized and not (embedding is not None and (OUTPUT in whole or base.args.tie_word_embeddings)):
        missing = "embedding" if embedding is None else "output layer"
        raise CheckpointError(f"{adapter.file}: has a vocabulary of its own, but no {missing} for it")
    if base.args.tie_word_embeddings:
        whole.pop(OUTPUT, None)
    stored = {weight.name: weight for weight in base.weights()}
    biases = _biases(adapter, stored)
    flags = {field: True for name in biases if (field := module_of(name).bias)}
    args = replace(base.args, vocab_size=vocab_size, **flags)
    added = {name: shape for name, shape in expected_shapes(args) if name.endswith(".bias") and name not in stored}

    def weights() -> Iterator[Weight]:
        for weight in base.weights():
            array = biases.get(weight.name) or whole.get(weight.name) or weight.array
            change = adapter.low_rank.get(weight.name.removesuffix(".weight"))
            if change is not None:
                array = Merged(array, change)
            yield weight if array is weight.array else replace(weight, array=array)
        for name, shape in added.items():
            yield Weight(name, biases.get(name) or Mapped(torch.zeros(shape)), adapter.file)

    packed = [weight for weight in stored.values() if weight.is_packed]
    unpacked = next((weight for weight in packed if weight.name.removesuffix(".weight") in adapter.low_rank), None)
    warnings: tuple[str, ...] = ()
    if unpacked is not None:
        warnings += (
            f"{unpacked.file}: is stored in {unpacked.stored}: what {adapter.path.name} changes is held as numbers, "
            "unless a quantization is named",
        )
    if adapter.unknown_keys:
        warnings += (f"{adapter.path}: settings that have no effect here: {', '.join(adapter.unknown_keys)}",)
    brought = adapter.tokenizer_path
    return replace(
        base,
        args=args,
        weights=weights,
        tokenizer_path=brought or base.tokenizer_path,
        header=base.header if brought is None else None,
        warnings=base.warnings + warnings,
    )


def _untied_for(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base with an output layer of its own, where the adapter changes it and the embedding differently.

    A layer of low rank on a tied embedding changes what is looked up, and not the product: PEFT's models compute so.
    """
    if not checkpoint.args.tie_word_embeddings or not checkpoint.has_head:
        return checkpoint
    embedding, output = adapter.whole.get(EMBEDDING), adapter.whole.get(OUTPUT)
    is_alone = "tok_embeddings" not in adapter.low_rank and "output" not in adapter.low_rank
    if is_alone and embedding is not None:
        if output is None and embedding.shape[0] != checkpoint.args.vocab_size:
            return checkpoint
        pair = {EMBEDDING: embedding, OUTPUT: output}
        if output is not None and is_tied({name: Weight(name, array, adapter.file) for name, array in pair.items()}):
            return checkpoint
    is_touched = not is_alone or embedding is not None or output is not None
    return untied(checkpoint) if is_touched else checkpoint


def _biases(adapter: Adapter, stored: dict[str, Weight]) -> dict[str, Array]:
    """The biases that the adapter changes: whole ones, and what it adds to the base model's, or to none."""
    changed: dict[str, Array] = {name: array for name, array in adapter.whole.items() if name.endswith(".bias")}
    for name, one in adapter.low_rank.items():
        if one.bias is None:
            continue
        name = f"{name}.bias"
        base = changed.get(name) or (stored[name].array if name in stored else None)
        start = 0.0 if base is None else base.read(0, 0, base.shape[0]).float()
        changed[name] = Mapped(start + one.bias)
    assert all(module_of(name).bias in BIASES for name in changed)
    return changed
