"""The shape that every weight of a model must have, and on how many ranks it can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..model import ModelArgs
from .weight import Weight


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
