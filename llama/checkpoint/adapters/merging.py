"""An adapter merged into its base model: a checkpoint whose weights are the sums, made as they are read.

It stands between reading and casting, so that loading, ranks, quantizing and every format that is written have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...files.errors import CheckpointError
from ...kernels.formats import row_chunks
from ..arrays import Array, Mapped, Wrapped, read_by_copy
from ..inventory import BIASES, EMBEDDING, OUTPUT, expected_shapes, is_linear, module_of
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
        else:  # a length wants all of a row, or of a column
            for part in row_chunks(*self.shape):
                place = out[part]
                place.copy_(self._rows(part.start, part.start + len(place))[:, start:stop])

    def _rows(self, start: int, stop: int) -> Tensor:
        total = self._sum(start, stop)
        magnitude = self.change.magnitude
        if magnitude is None:
            return total
        if self.change.is_embedding:
            return total * (magnitude.float() / self._column_lengths)
        return total * (magnitude[start:stop].float() / total.norm(dim=1)).unsqueeze(1)

    def _sum(self, start: int, stop: int) -> Tensor:
        return self.array.read(0, start, stop).float() + self.change.delta(slice(start, stop))

    @cached_property
    def _column_lengths(self) -> Tensor:
        """(columns,) of the sum; everything is read for it."""
        rows, columns = self.shape
        chunks = (range(rows)[part] for part in row_chunks(rows, columns))
        return sum(self._sum(chunk.start, chunk.stop).square_().sum(0) for chunk in chunks).sqrt()


def merge_adapter(
    checkpoint: Checkpoint, adapter: Adapter, keeps: Callable[[Weight], bool] = lambda weight: False
) -> tuple[Checkpoint, Adapter | None]:
    """The checkpoint with the adapter in it: its vocabulary, tokenizer and chat template too, where it brings them.

    Linears of which `keeps` is true stay in their blocks, in which a small change would be lost: what is to be added
    beside them is an adapter of its own. Nothing is read but vectors. Raises CheckpointError where the two do not
    belong together.
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
    kept = {name for name, weight in stored.items() if is_linear(name) and keeps(weight)}
    beside = {name: one for name, one in adapter.low_rank.items() if f"{name}.weight" in kept}
    added = {name: shape for name, shape in expected_shapes(args) if name.endswith(".bias") and name not in stored}

    def weights() -> Iterator[Weight]:
        for weight in base.weights():
            array = biases.get(weight.name) or whole.get(weight.name) or weight.array
            module = weight.name.removesuffix(".weight")
            if module in adapter.low_rank and module not in beside:
                array = Merged(array, adapter.low_rank[module])
            yield weight if array is weight.array else replace(weight, array=array)
        for name, shape in added.items():
            yield Weight(name, biases.get(name) or Mapped(torch.zeros(shape)), adapter.file)

    brought = adapter.tokenizer_path
    merged = replace(
        base,
        args=args,
        weights=weights,
        tokenizer_path=brought or base.tokenizer_path,
        header=base.header if brought is None else None,
        warnings=base.warnings + tuple(_warnings(adapter, stored, beside)),
    )
    without_bias = {name: replace(one, bias=None) for name, one in beside.items()}  # for that is merged
    return merged, replace(adapter, low_rank=without_bias, whole={}) if beside else None


def _warnings(adapter: Adapter, stored: dict[str, Weight], beside: dict[str, LowRank]) -> Iterator[str]:
    if beside:
        weight = stored[f"{next(iter(beside))}.weight"]
        yield (
            f"{weight.file}: is stored in {weight.stored}: {adapter.path.name} is computed beside its blocks, which "
            "takes some more time; the quantization 'none', or one by its name, merges it"
        )
    changed = (stored.get(f"{name}.weight") for name in adapter.low_rank if name not in beside)
    unpacked = next((weight for weight in changed if weight is not None and weight.is_packed), None)
    if unpacked is not None:
        yield (
            f"{unpacked.file}: {unpacked.name} is stored in {unpacked.stored}, and becomes numbers where "
            f"{adapter.path.name} changes it; a small change is lost where these are packed again"
        )
    if adapter.unknown_keys:
        yield f"{adapter.path}: settings that have no effect here: {', '.join(adapter.unknown_keys)}"


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
