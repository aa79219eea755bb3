"""Embeddings: tables whose rows are looked up, as numbers or in low-bit blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llama.kernels.formats import FORMATS
from llama.kernels.lowbit import lowbit_rows
from llama.linear import StoredWeight
from llama.parallel import ALONE, TensorParallel, share


class Embedding(nn.Module):
    """Rows of a table that is cut over the vocabulary, as `share` cuts it.

    A table that is only looked up may stay `as_stored`, in a smaller type than the model computes in.
    """

    def __init__(self, vocab_size: int, dim: int, parallel: TensorParallel = ALONE, as_stored: bool = False):
        super().__init__()
        self.as_stored = as_stored
        self.parallel = parallel
        self.vocab_size = vocab_size
        self.first, stop = share(vocab_size, parallel.rank, parallel.size)
        self.num_rows = stop - self.first
        self.dim = dim
        self.weight: torch.Tensor = nn.Parameter(torch.empty(self.num_rows, dim), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(num_tokens,) int64 -> (num_tokens, dim)"""
        if self.parallel.size == 1:
            return self.rows(tokens)
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.num_rows)
        rows = self.rows(local.masked_fill(elsewhere, 0))
        return self.parallel.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def rows(self, local: torch.Tensor) -> torch.Tensor:
        """Copies of this rank's rows of these numbers, (n,) int64, counted from its first one: (n, dim)."""
        return F.embedding(local, self.weight)


class LowBitEmbedding(Embedding):
    """An embedding whose table stays in the blocks in which it is stored, which may be the mapped file itself.

    `weight` is uint8 (num_rows, bytes of a row) in the published layout. Rows are dequantized when they are looked up,
    bit for bit what unpacking all of them first would give.
    """

    def __init__(self, format: str, vocab_size: int, dim: int, parallel: TensorParallel = ALONE):
        super().__init__(vocab_size, dim, parallel)
        self.format = FORMATS[format]
        self.dtype = torch.float32
        shape = (self.num_rows, self.format.packed_columns(dim))
        del self.weight
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8))

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `LoadsItself`."""
        return {"weight": (self.num_rows, self.dim)}

    def load_weight(self, name: str, weight: StoredWeight, device: torch.device, dtype: torch.dtype | None) -> None:
        """Takes stored blocks of its format as they are; rows are looked up in `dtype`."""
        self.weight = weight.read_packed()[0].to(device)
        self.dtype = dtype or torch.float32

    def rows(self, local: torch.Tensor) -> torch.Tensor:
        return lowbit_rows(self.weight, local, self.format).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {self.num_rows} rows of {self.dim}"
