"""Text to token ids and back, for every kind of vocabulary that Llama models come with.

`Tokenizer` opens a sentencepiece model, Llama 3's tiktoken file, a Hugging Face `tokenizer.json` or the vocabulary
inside a GGUF file; `KINDS` is the table of them, and a file's content, never its name, says which it is. Three rules
hold for all kinds:

- Text never becomes a control token. What a user types as `</s>` or `<|eot_id|>` is encoded as ordinary text.
- Control tokens have no text: `decode` leaves them out, as sentencepiece does. Tokens that were added to a
  vocabulary without being marked as special (`<think>`, `<tool_call>`) are shown, but never come from text either.
- `decode` is what a `StreamDecoder` shows, so that streamed text is decoded text.
"""

from __future__ import annotations

import base64
import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor

from llama.vocabulary import (
    BYTE_OF_CHAR,
    CHAR_OF_BYTE,
    LLAMA3_PATTERN,
    PRE_TOKENIZERS,
    PreTokenizer,
    TokenizerError,
    TokenizerJson,
    TokenType,
    Vocabulary,
    is_bpe_proto,
    proto_from_vocabulary,
    read_gguf_metadata,
    read_json,
    vocabulary_from_proto,
    with_control_pieces,
)

__all__ = ["KINDS", "StreamDecoder", "Tokenizer", "TokenizerError", "Vocabulary"]

# --- ids to text ------------------------------------------------------------------------------------------------


class _ByteStream:
    """Byte-level vocabularies: tokens are slices of one UTF-8 text, and may cut a character anywhere."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(self._token_bytes(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PieceStream:
    """Sentencepiece vocabularies: "▁" for a space, and whole characters except in runs of byte tokens.

    The same as `SentencePieceProcessor.decode`: the space that encoding put in front is taken away again, and a byte
    that is no part of a character becomes U+FFFD.
    """

    def __init__(self, vocabulary: Vocabulary, unknown: str) -> None:
        self._tokens, self._types, self._unknown = vocabulary.tokens, vocabulary.types, unknown
        self._strips_all = vocabulary.remove_extra_whitespaces
        self._at_start = vocabulary.add_space_prefix or vocabulary.remove_extra_whitespaces
        self._held = bytearray()  # bytes that may be the beginning of a character

    def push(self, id: int) -> str:
        if self._types[id] == TokenType.BYTE:
            self._held.append(int(self._tokens[id][3:5], 16))
            return self._show(self._characters())
        text = self.flush()
        if self._types[id] == TokenType.CONTROL:
            return text
        if self._types[id] == TokenType.UNKNOWN:
            return text + self._show(self._unknown)
        piece = self._tokens[id]
        if self._at_start and piece.startswith("▁"):
            piece = piece[1:]
            self._at_start = self._strips_all
        return text + self._show(piece.replace("▁", " "))

    def flush(self) -> str:
        return self._show(self._characters(final=True))

    def _show(self, text: str) -> str:
        self._at_start = self._at_start and not text
        return text

    def _characters(self, final: bool = False) -> str:
        """Take every complete (or hopeless) character out of the bytes held; with `final`, all of them."""
        shown = []
        while self._held:
            first = self._held[0]
            size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
            try:
                shown.append(self._held[:size].decode())
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and not final:
                    break
                shown.append("\ufffd")
                size = 1
            del self._held[:size]
        return "".join(shown)


class StreamDecoder:
    """Token ids to text, one at a time, never half a character.

    What `push` and the last `flush` return joins to exactly `tokenizer.decode(all ids)`, whatever the ids. Bytes that
    may become a character are held back until the ids show whether they do. Each id costs the same, however many came
    before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.codec.text()
        self._n_words = tokenizer.n_words

    def push(self, id: int) -> str:
        """The text that `id` makes certain; often "". Raises ValueError for an id outside the vocabulary."""
        if not 0 <= id < self._n_words:
            raise ValueError(f"token id {id} is outside the vocabulary of {self._n_words} tokens (0 to {self._n_words - 1})")
        return self._stream.push(id)

    def flush(self) -> str:
        """The text that was held back: U+FFFD for the bytes of a character that was never finished."""
        return self._stream.flush()


# --- the codecs: how one kind of vocabulary works ---------------------------------------------------------------


class Codec(Protocol):
    """One way to tokenize. Ids run from 0 to n_words - 1; `special_tokens` are those that text never becomes."""

    n_words: int
    special_tokens: dict[str, int]
    sp_model: SentencePieceProcessor | None

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...

    def text(self) -> _ByteStream | _PieceStream: ...

    def vocabulary(self) -> Vocabulary: ...


class _SentencePiece:
    """A sentencepiece model. `sp_model` is the model as it is; encoding needs a copy if it would find added tokens."""

    def __init__(self, proto: bytes) -> None:
        self.sp_model = SentencePieceProcessor(model_proto=proto)
        self._vocabulary = vocabulary_from_proto(proto)
        self._is_bpe = is_bpe_proto(proto)
        self.n_words = len(self._vocabulary.tokens)
        self.special_tokens = self._vocabulary.special_tokens()
        added = {id for id in self.special_tokens.values() if self._vocabulary.types[id] != TokenType.CONTROL}
        self._encoder = SentencePieceProcessor(model_proto=with_control_pieces(proto, added)) if added else self.sp_model

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text)

    def token_bytes(self, id: int) -> bytes:
        token, type = self._vocabulary.tokens[id], self._vocabulary.types[id]
        if type == TokenType.BYTE:
            return bytes([int(token[3:5], 16)])
        if type in (TokenType.CONTROL, TokenType.UNKNOWN):
            return self.sp_model.decode([id]).encode()
        return token.replace("▁", " ").encode()

    def text(self) -> _PieceStream:
        return _PieceStream(self._vocabulary, unknown=self.sp_model.decode([self.sp_model.unk_id()]))

    def vocabulary(self) -> Vocabulary:
        if not self._is_bpe:
            raise TokenizerError("this sentencepiece model is not BPE: a GGUF vocabulary cannot tokenize like it")
        return self._vocabulary


_MAX_CHARS = 400_000  # tiktoken panics far above this (Meta's llama3/tokenizer.py keeps both limits)
_MAX_RUN = 25_000  # of white space, or of anything else: tiktoken grows slow on longer ones


def _cut_long_runs(text: str) -> Iterator[str]:
    """Cut text where Meta's tokenizer for Llama 3 does. The parts join to the text."""
    for start in range(0, len(text), _MAX_CHARS):
        chunk = text[start : start + _MAX_CHARS]
        at = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for stop in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[at:stop]
                at = stop
        yield chunk[at:]


class _Tiktoken:
    """Meta's Llama 3 vocabulary: ranked byte strings, and 256 special tokens that follow them.

    Source: meta-llama/llama-models, models/llama3/tokenizer.py.
    """

    sp_model = None

    def __init__(self, ranks: dict[bytes, int]) -> None:
        special = [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
        ]
        special += [f"<|reserved_special_token_{number}|>" for number in range(2, 258 - len(special))]
        self._ranks = ranks
        self.n_words = len(ranks) + len(special)
        self.special_tokens = {token: len(ranks) + index for index, token in enumerate(special)}
        self._model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def encode(self, text: str) -> list[int]:
        return [id for part in _cut_long_runs(text) for id in self._model.encode_ordinary(part)]

    def token_bytes(self, id: int) -> bytes:
        return self._model.decode_single_token_bytes(id) if id < len(self._ranks) else b""

    def text(self) -> _ByteStream:
        return _ByteStream(self.token_bytes)

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


class _Tokenizers:
    """A tokenizer.json, run by the tokenizers library with all special tokens taken out of it.

    Only encoding is the library's; decoding is done here, because it has to stream.
    """

    sp_model = None

    def __init__(self, source: TokenizerJson, cut_long_runs: bool = False) -> None:
        self._source = source
        self._tokens, self._types = source.vocabulary.tokens, source.vocabulary.types
        self._cut: Callable[[str], Iterable[str]] = _cut_long_runs if cut_long_runs else lambda text: (text,)
        self.n_words = len(self._tokens)
        self.special_tokens = source.vocabulary.special_tokens()
        self._model = source.build()

    def encode(self, text: str) -> list[int]:
        return [id for part in self._cut(text) for id in self._model.encode(part, add_special_tokens=False).ids]

    def token_bytes(self, id: int) -> bytes:
        token, type = self._tokens[id], self._types[id]
        if type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED):
            return b""
        if not self._source.is_byte_level:
            return bytes([int(token[3:5], 16)]) if type == TokenType.BYTE else token.replace("▁", " ").encode()
        if type == TokenType.USER_DEFINED or not BYTE_OF_CHAR.keys() >= set(token):
            return token.encode()
        return bytes(BYTE_OF_CHAR[char] for char in token)

    def text(self) -> _ByteStream | _PieceStream:
        if self._source.is_byte_level:
            return _ByteStream(self.token_bytes)
        return _PieceStream(self._source.vocabulary, unknown="")

    def vocabulary(self) -> Vocabulary:
        return self._source.full_vocabulary()
