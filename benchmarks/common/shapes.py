"""Models of random weights: shapes of real ones, and how they are written to disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import torch

from llama.model import ModelArgs, Transformer

TINYLLAMA = ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=32000)
SMOLLM2 = ModelArgs(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152)
TINY = ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=512, vocab_size=32000)


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


def vocabulary() -> Path:
    """A sentencepiece file of 32000 tokens, found without importing the package that carries it."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        raise FileNotFoundError("no vocabulary of 32000 tokens: pip install mistral-common")
    return Path(spec.submodule_search_locations[0], "data", "tokenizer.model.v1")


def write_model(directory: Path, args: ModelArgs, dtype: torch.dtype = torch.bfloat16, tokenizer: bool = True) -> None:
    """A random model in Meta's layout: normal weights of deviation 0.02, norms of 1; a vocabulary of 32000 tokens."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.ones(size, dtype=dtype) for name, size in weight_shapes(args).items()}
    for weight in weights.values():
        if weight.dim() == 2:
            weight.normal_(0, 0.02, generator=generator)
    directory.mkdir()
    torch.save(weights, directory / "consolidated.00.pth")
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "norm_eps")
    (directory / "params.json").write_text(json.dumps({name: getattr(args, name) for name in names}))
    if tokenizer:
        shutil.copy(vocabulary(), directory / "tokenizer.model")
