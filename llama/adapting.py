"""From an adapter's files to what this rank adds to its part of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import Adapter, CheckpointError, LowRank, open_weighted
from llama.checkpoint.inventory import EMBEDDING, OUTPUT, is_held, split_dim
from llama.kernels.formats import row_chunks
from llama.kernels.lowrank import Factors
from llama.linear import Joint
from llama.lora import (
    Adapters,
    Change,
    ColumnChange,
    LowRankChange,
    LowRankEmbedding,
    Site,
    WholeEmbedding,
    WholeOutput,
    site_at,
)
from llama.model import Transformer
from llama.parallel import share


def adapters_of(model: Transformer) -> Adapters:
    """A model's adapters, none yet: they change its joint products, its embedding and its output layer."""
    places = {name: (joint, "added") for name, joint in joints(model)}
    places |= {"tok_embeddings": (model, "added_to_embedding"), Adapters.OUTPUT: (model, "added_to_output")}
    return Adapters(places, leads=model.parallel.rank == 0, tells=model.parallel.leads)


def joints(model: Transformer) -> Iterator[tuple[str, Joint]]:
    """By the name of their first part."""
    for number, layer in model.held_layers.items():
        for path, owner in (("attention", layer.attention), ("feed_forward", layer.feed_forward)):
            for joint in vars(owner).values():
                if isinstance(joint, Joint):
                    yield f"layers.{number}.{path}.{joint.names[0]}", joint


def read_adapters(
    given: str | Path | Sequence[str | Path], model: Transformer
) -> tuple[bytes, dict[str, list[Change]]]:
    """A digest of an adapter's content, and what this rank adds for it, by place. Every rank takes part.

    Several adapters, paths or "PATH=0.7", are added up. Raises FileNotFoundError or CheckpointError.
    """
    with model.parallel.failing_together():  # before they meet
        opened = [open_weighted(one) for one in ([given] if isinstance(given, str | Path) else given)]
    with model.parallel.failing_together():  # a stage may have what is wrong
        if len(opened) == 1:
            return opened[0].digest, changes_of(opened[0], model)
        changes: dict[str, list[Change]] = {}
        for one in opened:
            if not one.is_sum:
                raise CheckpointError(
                    f"{one.path.name}: whole weights and DoRA's magnitudes are taken as they are, and cannot be added "
                    "to another adapter's"
                )
            for place, some in changes_of(one, model).items():
                changes.setdefault(place, []).extend(some)
    return hashlib.sha256(b"".join(one.digest for one in opened)).digest(), changes


def add_always(adapter: Adapter, model: Transformer) -> None:
    """What a merged adapter adds to linears that stay in their blocks: to all rows, whoever asks."""
    places = adapters_of(model).places
    for place, changes in changes_of(adapter, model).items():
        owner, attribute = places[place]
        site = site_at(owner, attribute)
        site.always.extend(changes)
        setattr(owner, attribute, site)


def changes_of(adapter: Adapter, model: Transformer) -> dict[str, list[Change]]:
    """What this rank adds, by place. Every rank takes part.

    Raises CheckpointError for what only a merged adapter can do, and for an adapter of another model.
    """
    args = model.params
    fitted = adapter.fitted(args)
    for name, array in fitted.whole.items():
        if name in (EMBEDDING, OUTPUT) and array.shape[0] != args.vocab_size:
            raise CheckpointError(
                f"{adapter.file}: has a vocabulary of its own, {array.shape[0]} tokens beside the model's "
                f"{args.vocab_size}: merge it, with Llama.build(..., adapter=...) or --lora"
            )
        if name not in (EMBEDDING, OUTPUT) and not name.endswith(".bias"):
            raise CheckpointError(
                f"{adapter.file}: {name}: is whole, which a merged adapter alone can be: "
                "Llama.build(..., adapter=...) or --lora"
            )
    return _Adapting(fitted, model).changes()


class _Adapting:
    """One adapter on its way to one rank's model."""

    def __init__(self, adapter: Adapter, model: Transformer):
        self.adapter = adapter
        self.model = model
        self.tensor = model.tensor
        self.like = model.norm.weight

    def changes(self) -> dict[str, list[Change]]:
        found: dict[str, list[Change]] = {}
        for place, joint in joints(self.model):
            path = place.rpartition(".")[0]
            if changes := list(self._joint(joint, [f"{path}.{name}" for name in joint.names])):
                found[place] = changes
        if self.model.stage.is_first and (embedding := list(self._embedding())):
            found["tok_embeddings"] = embedding
        if self.model.stage.is_last and (output := list(self._output())):
            found[Adapters.OUTPUT] = output
        return found

    def _joint(self, joint: Joint, names: list[str]) -> Iterator[Change]:
        """What is changed behind a joint product, whose linears have these names."""
        linears = joint.linears
        starts = [sum(linear.out_features for linear in linears[:i]) for i in range(len(linears) + 1)]
        places = [slice(start, stop) for start, stop in pairwise(starts)]
        pairs, columns = [], []
        gain, offset = torch.ones(starts[-1]), torch.zeros(starts[-1])
        for name, linear, place in zip(names, linears, places, strict=True):
            low_rank = self.adapter.low_rank.get(name)
            bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float().cpu()
            new_bias = bias
            whole = self.adapter.whole.get(f"{name}.bias")
            if whole is not None and is_held(f"{name}.bias", self.tensor.rank):
                new_bias = self._part(whole.read(0, 0, whole.shape[0]).float(), f"{name}.bias")
            if low_rank is not None:
                a, b = self._parts(low_rank, f"{name}.weight")
                if low_rank.magnitude is not None:
                    self._validate_alone(joint.added, name)
                    gain[place] = self._gain(low_rank, f"{name}.weight", linear.dequantize().cpu(), a, b)
                    b = b * gain[place].unsqueeze(1)
                if low_rank.bias is not None and is_held(f"{name}.bias", self.tensor.rank):
                    new_bias = new_bias + self._part(low_rank.bias, f"{name}.bias")
                pairs.append((self._own(a), self._own(b)))
                columns.append(place.start)
            offset[place] = new_bias - gain[place] * bias
        has_gain, has_offset = bool((gain != 1).any()), bool(offset.any())
        if has_gain or has_offset:
            yield ColumnChange(self._own(gain) if has_gain else None, self._own(offset) if has_offset else None)
        if pairs:
            yield LowRankChange(Factors.of(pairs, columns), self.model.fixed_rows)

    def _embedding(self) -> Iterator[Change]:
        whole, low_rank = self.adapter.whole.get(EMBEDDING), self.adapter.low_rank.get("tok_embeddings")
        if whole is not None and not self._is_stored(EMBEDDING):
            yield WholeEmbedding(self._own(whole.read(0, 0, whole.shape[0])))
        if low_rank is not None:
            a, b = low_rank.a.float(), low_rank.b.float() * low_rank.scale
            if low_rank.magnitude is not None:
                gain = low_rank.magnitude.float() / self._lengths(a, b)
                a = a * gain
                yield ColumnChange(self._own(gain))
            yield LowRankEmbedding(self._own(b), self._own(a))

    def _output(self) -> Iterator[Change]:
        whole, low_rank = self.adapter.whole.get(OUTPUT), self.adapter.low_rank.get("output")
        weight = None
        if whole is not None and not self._is_stored(OUTPUT):
            weight = self._part(whole.read(0, 0, whole.shape[0]), OUTPUT).float()
            yield WholeOutput(self._own(weight), self.model.fixed_rows)
        if low_rank is not None:
            a, b = self._parts(low_rank, OUTPUT)
            if low_rank.magnitude is not None:
                self._validate_alone(self.model.added_to_output, OUTPUT)
                gain = self._gain(low_rank, OUTPUT, self._head() if weight is None else weight, a, b)
                b = b * gain.unsqueeze(1)
                yield ColumnChange(self._own(gain))
            yield LowRankChange(Factors.of([(self._own(a), self._own(b))], [0]), self.model.fixed_rows)

    def _lengths(self, a: Tensor, b: Tensor) -> Tensor:
        """Of the columns (dim,) of the embedding with b a added, over every rank's rows."""
        table = self.model.tok_embeddings
        squares = torch.zeros(table.dim)
        for part in row_chunks(table.num_rows, table.dim):
            rows = torch.arange(table.num_rows)[part]
            own = table.rows(rows.to(self.like.device)).float().cpu()
            squares += torch.addmm(own, b[table.first + rows], a).square_().sum(0)
        return self.tensor.all_reduce(squares).sqrt()

    def _is_stored(self, name: str) -> bool:
        """Whether a whole weight has the model's own values, as adapters often bring them along."""
        module = self.model.tok_embeddings if name == EMBEDDING or self.model.output is None else self.model.output
        own = getattr(module, "weight", None)
        if own is None or not own.is_floating_point():
            return False
        part = self._part(self.adapter.whole[name].read(0, 0, self.adapter.whole[name].shape[0]), name)
        return self._agree(torch.equal(part.to(own.dtype), own.cpu()))

    def _agree(self, value: bool) -> bool:
        """Whether it is so on every rank."""
        return bool(self.tensor.all_reduce(torch.tensor([float(value)])) == self.tensor.size)

    def _head(self) -> Tensor:
        """This rank's part of the output layer, float32, on the CPU."""
        model = self.model
        return (model.tok_embeddings.weight.float() if model.output is None else model.output.dequantize()).cpu()

    def _parts(self, low_rank: LowRank, name: str) -> tuple[Tensor, Tensor]:
        """This rank's a and scaled b, float32: what is cut is cut as the weight is."""
        a, b = low_rank.a.float(), low_rank.b.float() * low_rank.scale
        if split_dim(name) == 0:
            return a, self._part(b, name)
        return self._part(a, name), b

    def _part(self, tensor: Tensor, name: str) -> Tensor:
        """This rank's part of a tensor that is cut as the weight or bias `name`."""
        dim = split_dim(name)
        if dim is None or self.tensor.size == 1:
            return tensor
        start, stop = share(tensor.shape[dim], self.tensor.rank, self.tensor.size)
        return tensor.narrow(dim, start, stop - start)

    def _validate_alone(self, site: Site | None, name: str) -> None:
        if site is not None and site.always:
            raise CheckpointError(
                f"{self.adapter.file}: {name}: DoRA's lengths are those of a sum, which is not made where an adapter "
                "stands beside packed weights: build the model with quantization='none'"
            )

    def _gain(self, low_rank: LowRank, name: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """DoRA's magnitudes over the lengths of the sum's rows, (rows,): a constant once the adapter is trained."""
        squares = torch.addmm(weight.float(), b, a).square_().sum(1)
        magnitude = low_rank.magnitude.float()
        if split_dim(name) == 1:
            return magnitude / self.tensor.all_reduce(squares).sqrt()
        return self._part(magnitude, name) / squares.sqrt()

    def _own(self, tensor: Tensor) -> Tensor:
        """As the model computes, where it computes."""
        return tensor.to(self.like.device, self.like.dtype).contiguous()
