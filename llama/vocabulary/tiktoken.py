"""Llama 3's vocabulary as Meta ships it: a line for each token, in base64, with its rank.

Source: meta-llama/llama-models, models/llama3/tokenizer.py.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .added import AddedToken, Piece
from .beside import read_beside
from .byte_level import BYTE_OF_CHAR, CHAR_OF_BYTE, LLAMA3_PATTERN, ByteStream
from .vocabulary import Codec, Controls, TokenizerError, TokenType, Vocabulary, needed_cutter

NUM_SPECIAL = 256
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(2, NUM_SPECIAL - 10)),
)  # fmt: skip
"""The special tokens, which follow the ranked ones."""

MAX_CHARS = 400_000  # tiktoken panics far above this (Meta's file keeps both limits)
MAX_RUN = 25_000  # of white space, or of anything else: tiktoken grows slow on longer ones


def from_tiktoken(path: Path, chat_template: str | None = None) -> tuple[Codec, Controls]:
    """The ranks in a file, with what the files beside it say."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    has_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if list(ranks.values()) != list(range(len(ranks))) or not has_bytes:
        raise TokenizerError("the ranks are not 0, 1, 2, ... once each, or a single byte has none")
    beside = read_beside(path.parent, chat_template)
    codec = Tiktoken(ranks, beside.added, beside.chat_template)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
    controls = Controls(*(codec.special_tokens.get(name, -1) for name in names), add_bos=True)
    return codec, beside.controls(controls, codec.special_tokens)


class Tiktoken:
    """Ranked byte strings, and the special tokens that follow them."""

    sp_model = None

    def __init__(
        self, ranks: dict[bytes, int], added: Sequence[AddedToken] = (), chat_template: str | None = None
    ) -> None:
        import tiktoken

        self._ranks = ranks
        control = [AddedToken(token, id, special=True) for id, token in enumerate(SPECIAL, len(ranks))]
        tokens = ["".join(CHAR_OF_BYTE[byte] for byte in token) for token in ranks]
        base = Vocabulary("bpe", tokens, [int(TokenType.NORMAL)] * len(tokens), pre="llama-bpe")
        self.tokens = base.with_added([*control, *added])
        self.n_words = len(self.tokens.tokens)
        self.special_tokens = self.tokens.special_tokens(chat_template)
        self._model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._cutter = needed_cutter(self.tokens, self.special_tokens)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for piece in self._cutter.cut(pieces) if self._cutter else pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += [id for part in cut_long_runs(piece) for id in self._model.encode_ordinary(part)]
        return ids

    def token_bytes(self, id: int) -> bytes:
        if id < len(self._ranks):
            return self._model.decode_single_token_bytes(id)
        shown = self.tokens.types[id] == TokenType.USER_DEFINED
        return self.tokens.tokens[id].encode() if shown else b""

    def stream(self) -> ByteStream:
        return ByteStream(self.token_bytes)

    def vocabulary(self) -> Vocabulary:
        names = dict(zip(self._ranks, self.tokens.tokens, strict=False))
        merges = [f"{names[left]} {names[right]}" for left, right in self._merges()]
        return replace(self.tokens, merges=merges)

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
