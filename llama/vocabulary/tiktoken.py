"""Llama 3's vocabulary as Meta ships it: a line for each token, in base64, with its rank.

Source: meta-llama/llama-models, models/llama3/tokenizer.py.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from .beside import with_config
from .byte_level import BYTE_OF_CHAR, CHAR_OF_BYTE, LLAMA3_PATTERN, ByteStream
from .vocabulary import Codec, Controls, TokenizerError, TokenType, Vocabulary

NUM_SPECIAL = 256
SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(2, NUM_SPECIAL - 10)),
)
"""The special tokens, which follow the ranked ones."""

MAX_CHARS = 400_000  # tiktoken panics far above this (Meta's file keeps both limits)
MAX_RUN = 25_000  # of white space, or of anything else: tiktoken grows slow on longer ones


def open_tiktoken(path: Path) -> tuple[Codec, Controls]:
    """The ranks in a file, with what the files beside it say."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    has_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if list(ranks.values()) != list(range(len(ranks))) or not has_bytes:
        raise TokenizerError("the ranks are not 0, 1, 2, ... once each, or a single byte has none")
    codec = Tiktoken(ranks)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
    controls = Controls(*(codec.special_tokens[name] for name in names), add_bos=True)
    return codec, with_config(controls, path.parent, codec.special_tokens)


class Tiktoken:
    """Ranked byte strings, and the special tokens that follow them."""

    sp_model = None

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._ranks = ranks
        self.n_words = len(ranks) + len(SPECIAL)
        self.special_tokens = {token: id for id, token in enumerate(SPECIAL, len(ranks))}
        self._model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def encode(self, text: str) -> list[int]:
        return [id for part in cut_long_runs(text) for id in self._model.encode_ordinary(part)]

    def token_bytes(self, id: int) -> bytes:
        return self._model.decode_single_token_bytes(id) if id < len(self._ranks) else b""

    def stream(self) -> ByteStream:
        return ByteStream(self.token_bytes)

    def vocabulary(self) -> Vocabulary:
        tokens = {token: "".join(CHAR_OF_BYTE[byte] for byte in token) for token in self._ranks}
        return Vocabulary(
            kind="bpe",
            tokens=[*tokens.values(), *self.special_tokens],
            types=[int(TokenType.NORMAL)] * len(tokens) + [int(TokenType.CONTROL)] * len(self.special_tokens),
            merges=[f"{tokens[left]} {tokens[right]}" for left, right in self._merges()],
            pre="llama-bpe",
        )

    def _merges(self) -> Iterator[tuple[bytes, bytes]]:
        """tiktoken joins any two neighbours that make a token, the lowest rank first: so every split is a merge."""
        for token in self._ranks:
            splits = ((token[:at], token[at:]) for at in range(1, len(token)))
            known = [pair for pair in splits if pair[0] in self._ranks and pair[1] in self._ranks]
            yield from sorted(known, key=lambda pair: (self._ranks[pair[0]], self._ranks[pair[1]]))


def cut_long_runs(text: str) -> Iterator[str]:
    """Cut text where Meta's tokenizer for Llama 3 does. The parts join to the text."""
    for start in range(0, len(text), MAX_CHARS):
        chunk = text[start : start + MAX_CHARS]
        at = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for stop in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield chunk[at:stop]
                at = stop
        yield chunk[at:]


def is_ranked(vocabulary: Vocabulary) -> bool:
    """Whether this kind of file can hold it: tokens ranked in the order of their merges, then the special ones."""
    count = len(vocabulary.tokens) - NUM_SPECIAL
    if vocabulary.pre != "llama-bpe" or count < 256:
        return False
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    made = [ids.get(merge.replace(" ", ""), -1) for merge in vocabulary.merges]
    types_fit = all(type == TokenType.NORMAL for type in vocabulary.types[:count]) and all(
        type != TokenType.NORMAL for type in vocabulary.types[count:]
    )
    return types_fit and made == sorted(made)


def write_ranks(vocabulary: Vocabulary) -> bytes:
    """The file of a vocabulary that `is_ranked`."""
    ranked = enumerate(vocabulary.tokens[:-NUM_SPECIAL])
    lines = ((base64.b64encode(bytes(BYTE_OF_CHAR[char] for char in token)), rank) for rank, token in ranked)
    return b"".join(b"%b %d\n" % line for line in lines)
