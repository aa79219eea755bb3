"""The linears of models, by their shapes."""

from __future__ import annotations

import torch

from llama.bench.shapes import MODEL_SHAPES, write_model
from llama.model import ModelArgs, Transformer

__all__ = ["SMOLLM2", "TINY", "TINYLLAMA", "fused_linears", "separate_linears", "weight_shapes", "write_model"]

TINYLLAMA, SMOLLM2, TINY = (MODEL_SHAPES[name] for name in ("1.1b", "smollm2-135m", "tiny"))


def weight_shapes(args: ModelArgs) -> dict[str, torch.Size]:
    """The size of every weight, by its canonical name."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(args).named_parameters()}


def separate_linears(args: ModelArgs) -> list[tuple[int, int]]:
    """(rows, columns) of all linear layers, the output layer last."""
    dim, hidden, kv_dim = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim
    block = [
        (dim, dim),
        (kv_dim, dim),
        (kv_dim, dim),
        (dim, dim),
        (hidden, dim),
        (hidden, dim),
        (dim, hidden),
    ]
    return block * args.n_layers + [(args.vocab_size, dim)]


def fused_linears(args: ModelArgs) -> list[tuple[int, int]]:
    """(rows, columns) with wq, wk, wv in one product and w1, w3 in one, the output layer last."""
    dim, hidden, kv_dim = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim
    block = [(dim + 2 * kv_dim, dim), (dim, dim), (2 * hidden, dim), (dim, hidden)]
    return block * args.n_layers + [(args.vocab_size, dim)]
