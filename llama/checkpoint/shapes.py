"""The shape that every weight of a model must have, and on how many ranks it can run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..model import ModelArgs
from .weight import CheckpointError, Weight

_LAYER = re.compile(r"layers\.(\d{1,6})\.")


def expected_shapes(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical name and whole shape of every weight that a model of this shape has."""
    query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    yield "tok_embeddings.weight", (args.vocab_size, args.dim)
    linears = (
        ("attention.wq", query, args.dim, args.attention_bias),
        ("attention.wk", key, args.dim, args.attention_bias),
        ("attention.wv", key, args.dim, args.attention_bias),
        ("attention.wo", args.dim, query, args.attention_output_bias),
        ("feed_forward.w1", args.hidden_dim, args.dim, args.mlp_bias),
        ("feed_forward.w2", args.dim, args.hidden_dim, args.mlp_bias),
        ("feed_forward.w3", args.hidden_dim, args.dim, args.mlp_bias),
    )
    for layer in range(args.n_layers):
        yield f"layers.{layer}.attention_norm.weight", (args.dim,)
        yield f"layers.{layer}.ffn_norm.weight", (args.dim,)
        for name, rows, columns, bias in linears:
            yield f"layers.{layer}.{name}.weight", (rows, columns)
            if bias:
                yield f"layers.{layer}.{name}.bias", (rows,)
    yield "norm.weight", (args.dim,)
    if not args.tie_word_embeddings:
        yield "output.weight", (args.vocab_size, args.dim)


def check_layers(args: ModelArgs, weights: Sequence[Weight], file: Path) -> None:
    """Raises CheckpointError if the config says more layers than weights are stored for.

    It is the one number that decides how much is built before any weight is looked at.
    """
    found = (_LAYER.match(weight.name) for weight in weights)
    stored = max((int(match[1]) + 1 for match in found if match), default=0)
    if args.n_layers > stored:
        raise CheckpointError(f"{file}: the config says {args.n_layers} layers, but {stored} are stored")


def is_tied(weights: Sequence[Weight]) -> bool:
    """Whether the output layer is the embedding: it is not stored, or it is stored twice with equal values."""
    by_name = {weight.name: weight for weight in weights}
    output, embedding = by_name.get("output.weight"), by_name.get("tok_embeddings.weight")
    if output is None or embedding is None:
        return output is None
    if output.shape != embedding.shape or output.stored != embedding.stored or len(output.shape) != 2:
        return False
    few = min(16, output.shape[0])
    return torch.equal(output.read(0, 0, few), embedding.read(0, 0, few)) and torch.equal(
        output.read(), embedding.read()
    )
