"""Tiny random models and a byte tokenizer: nothing here needs weights or a vocabulary."""

import codecs
from collections.abc import Iterable

import torch

from llama.model import ModelArgs, Transformer
from llama.tokenizer import StreamDecoder


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(bytes([id]) if id < 256 else b"")

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteCodec:
    stream = ByteStream


class ByteTokenizer:
    """Token b is byte b; then come three control tokens, and some that nobody uses."""

    kind = "bytes"
    codec = ByteCodec()
    n_words = 264
    bos_id, eos_id, pad_id = 256, 257, 258
    stop_ids = frozenset({257})
    special_tokens = {"<s>": 256, "</s>": 257, "<pad>": 258}
    add_bos = True
    chat_template = None

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + list(s.encode()) + [self.eos_id] * eos

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        return [id for piece in pieces for id in ([piece] if isinstance(piece, int) else piece.encode())]

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    def decode(self, t: list[int] | int) -> str:
        stream = StreamDecoder(self)
        return "".join(stream.push(i) for i in ([t] if isinstance(t, int) else t)) + stream.flush()


def tiny_args(**changes) -> ModelArgs:
    """8 heads and 4 key/value heads: 1, 2 and 4 ranks can share them."""
    shape = dict(
        dim=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=264,
        multiple_of=16,
        max_seq_len=256,
        max_batch_size=4,
    )
    return ModelArgs(**{**shape, **changes})


def tiny_weights(args: ModelArgs, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by canonical name, large enough that greedy choices are clear-cut."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in Transformer(args).named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.1 * values
        else:
            weights[name] = values * (0.1 if name.endswith("bias") else 1.5 / parameter.shape[-1] ** 0.5)
    return weights


def tiny_model(args: ModelArgs, seed: int = 0, **kwargs) -> Transformer:
    model = Transformer(args, **kwargs)
    model.load_state_dict(tiny_weights(args, seed))
    return model


def answering_model(answer: str) -> Transformer:
    """A model whose answer is always this text of characters that all differ, and then the end.

    Each token's next one depends on it alone: what is not in the answer is followed by its first character.
    """
    args = tiny_args(dim=264, n_heads=4, n_kv_heads=4, n_layers=1, multiple_of=8, max_seq_len=1024, max_batch_size=16)
    model = Transformer(args)
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] += 1
    weights["tok_embeddings.weight"] += torch.eye(264)
    following = torch.full((264,), ord(answer[0]))
    following[[*answer.encode()]] = torch.tensor([*answer.encode()[1:], ByteTokenizer.eos_id])
    weights["output.weight"][ord('"')] = 1.0  # where the answer may not be given: a constraint's texts have an end
    weights["output.weight"][ByteTokenizer.eos_id] = 0.5
    weights["output.weight"][following, torch.arange(264)] = 10.0
    model.load_state_dict(weights)
    return model
