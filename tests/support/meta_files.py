"""Checkpoints on disk for tests: tiny random weights in Meta's layout, and a sentencepiece vocabulary to go with."""

import io
import json
from pathlib import Path

import sentencepiece
import torch

from llama.model import ModelArgs

TEXT = """The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.
How vexingly quick daft zebras jump! Sphinx of black quartz, judge my vow. 0123456789 [INST] [/INST] <<SYS>> <</SYS>>
A model continues a text by one token at a time, and each token is a piece of a word. Human: Assistant: user system
"""

JOINED_ON_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
JOINED_ON_COLUMNS = ("wo", "w2")


def save_tokenizer(path: Path, vocab_size: int = 400) -> Path:
    """Trains a sentencepiece vocabulary with byte fallback, as Llama 2's is made."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def save_meta(
    directory: Path,
    args: ModelArgs,
    weights: dict[str, torch.Tensor],
    shards: int = 1,
    embedding_dim: int = 1,
) -> Path:
    """Meta's layout in `shards` files; embeddings are cut along `embedding_dim` (1: Llama 2, 0: Llama 3)."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = {"rope.freqs": torch.zeros(args.head_dim // 2)}
        for name, weight in weights.items():
            module = name.split(".")[-2]
            dim = {"tok_embeddings": embedding_dim}.get(
                module, 0 if module in JOINED_ON_ROWS else 1 if module in JOINED_ON_COLUMNS else None
            )
            part[name] = weight.clone() if dim is None else weight.chunk(shards, dim)[shard].clone()
        torch.save(part, directory / f"consolidated.{shard:02d}.pth")
    params = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "multiple_of": args.multiple_of,
        "norm_eps": args.norm_eps,
        "vocab_size": -1,
    }
    (directory / "params.json").write_text(json.dumps(params))
    return directory
