"""Embeddings in low-bit blocks: rows looked up are, bit for bit, rows of the table unpacked first."""

from dataclasses import replace

import gguf
import pytest
import torch
from support.checkpoints import sample, write_gguf

from llama.checkpoint import load_weights, open_checkpoint, packed_modules, untied
from llama.embedding import Embedding, LowBitEmbedding
from llama.kernels import library
from llama.kernels.formats import FORMATS
from llama.model import Transformer
from llama.parallel import ALONE, TensorParallel
from llama.quantization import pack_modules

TOKENS = torch.tensor([3, 0, 263, 3, 66, 131, 132, 197, 198])  # at both ends of each quarter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Stored:
    """A table in blocks, or a rank's rows of it, as a checkpoint gives it to a module."""

    def __init__(self, format: str, table: torch.Tensor):
        self.format, self.packed = format, FORMATS[format].quantize(table)

    def part(self, parallel: TensorParallel) -> "Stored":
        part = object.__new__(Stored)
        part.format, part.packed = self.format, self.packed.chunk(parallel.size)[parallel.rank]
        return part

    def read(self) -> torch.Tensor:
        return FORMATS[self.format].dequantize(self.packed)

    def read_packed(self) -> tuple[torch.Tensor, str]:
        return self.packed, self.format


def table(rows: int = 264, dim: int = 256) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))


def low_bit(stored: Stored, dtype: torch.dtype | None = None, parallel: TensorParallel = ALONE) -> LowBitEmbedding:
    embedding = LowBitEmbedding(stored.format, 264, 256, parallel)
    embedding.load_weight("weight", stored.part(parallel), torch.device("cpu"), dtype)
    return embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_looked_up_is_the_row_of_the_table_unpacked_first(format, dtype):
    stored = Stored(format, table())
    rows = low_bit(stored, dtype)(TOKENS)
    assert rows.dtype == dtype
    assert torch.equal(rows, stored.read().to(dtype)[TOKENS])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_their_own_rows_and_zeros_for_the_others(monkeypatch, size):
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, x: x)
    stored, whole = Stored("q8_0", table()), Embedding(264, 256)
    whole.weight.copy_(stored.read())
    found = [low_bit(stored, parallel=TensorParallel(rank, size))(TOKENS) for rank in range(size)]
    assert torch.equal(sum(found), whole(TOKENS))
    owners = TOKENS // (264 // size)
    for rank, rows in enumerate(found):
        assert torch.equal(rows.any(-1), owners == rank)


@pytest.mark.skipif(not library.AVAILABLE, reason="without kernels nothing stays packed")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", [None, "sym_int4"])
def test_a_file_in_blocks_gives_the_embedding_as_it_is_mapped_and_the_same_states(tmp_path, tied, quantization):
    args, weights = sample(hidden_dim=128)
    if tied:
        del weights["output.weight"]
    path = write_gguf(tmp_path / "model.gguf", args, weights, gguf.GGMLQuantizationType.Q8_0)
    checkpoint = untied(open_checkpoint(path))
    packed = packed_modules(checkpoint, quantization)
    states = []
    for formats in (packed, {name: format for name, format in packed.items() if name != "tok_embeddings"}):
        with torch.device("meta"):
            model = Transformer(replace(checkpoint.args))
        pack_modules(model, formats)
        load_weights(model, checkpoint, dtype=torch.bfloat16)
        model.prepare()
        states.append(model(TOKENS.unsqueeze(0), 0))
        if isinstance(model.tok_embeddings, LowBitEmbedding):
            [stored] = (weight for weight in checkpoint.weights() if weight.name == "tok_embeddings.weight")
            assert model.tok_embeddings.weight.data_ptr() == stored.read_packed()[0].data_ptr()
    assert packed["tok_embeddings"] == "q8_0"
    assert torch.equal(*states)


def test_an_embedding_that_is_multiplied_with_is_unpacked(tmp_path):
    args, weights = sample(hidden_dim=128)
    del weights["output.weight"]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", args, weights, gguf.GGMLQuantizationType.Q8_0))
    assert "tok_embeddings" not in packed_modules(checkpoint, None)
    assert packed_modules(untied(checkpoint), "none") == {}
