"""Models of random weights, in the shapes of real ones, as checkpoints with a vocabulary that is made up too."""

from __future__ import annotations

import base64
import json
from itertools import islice, product
from pathlib import Path

import torch

from ..checkpoint.inventory import expected_shapes
from ..model import ModelArgs
from ..vocabulary.tiktoken import NUM_SPECIAL

MODEL_SHAPES = {
    "smollm2-135m": ModelArgs(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152, max_seq_len=8192
    ),
    "1.1b": ModelArgs(
        dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=32000, max_seq_len=8192
    ),
    "7b": ModelArgs(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000, max_seq_len=8192
    ),
    "8b": ModelArgs(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256, max_seq_len=8192
    ),
    "tiny": ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=512, vocab_size=1024, max_seq_len=8192),
}
"""Of SmolLM2-135M, TinyLlama, Llama 2 7B, Llama 3 8B, and of nothing: the last one shows that all sides run."""


def write_model(directory: Path, args: ModelArgs, dtype: torch.dtype = torch.bfloat16) -> None:
    """Makes `directory`, in Meta's layout: normal weights of deviation 0.02, norms of 1, and a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.ones(shape, dtype=dtype) for name, shape in expected_shapes(args)}
    for weight in weights.values():
        if weight.dim() == 2:
            weight.normal_(0, 0.02, generator=generator)
    directory.mkdir()
    torch.save(weights, directory / "consolidated.00.pth")
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "norm_eps", "max_seq_len")
    (directory / "params.json").write_text(json.dumps({name: getattr(args, name) for name in names}))
    write_vocabulary(directory / "tokenizer.model", args.vocab_size)


def write_vocabulary(path: Path, vocab_size: int) -> None:
    """A tokenizer of that many tokens in the layout of Llama 3's: every byte, then pairs, triples ... of letters."""
    letters = [bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"]
    longer = (b"".join(some) for length in (2, 3, 4) for some in product(letters, repeat=length))
    tokens = [*(bytes([byte]) for byte in range(256)), *islice(longer, vocab_size - NUM_SPECIAL - 256)]
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
