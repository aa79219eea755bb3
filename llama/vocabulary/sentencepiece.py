"""Sentencepiece models: the protobuf file that Llama 1 and 2 come with, read, run and written.

Field numbers: sentencepiece's sentencepiece_model.proto (ModelProto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .added import Piece
from .beside import read_beside
from .pieces import PieceStream, piece_bytes
from .vocabulary import Codec, Controls, TokenizerError, TokenType, Vocabulary, needed_cutter

BPE = 2
"""The type of model that Meta's files are; sentencepiece has others, with no place in GGUF's "llama"."""


def from_sentencepiece(path: Path, chat_template: str | None = None) -> tuple[Codec, Controls]:
    """The model in a file, with what the files beside it say."""
    proto, beside = path.read_bytes(), read_beside(path.parent, chat_template)
    vocabulary = replace(read_proto(proto), prefix=beside.prefix).with_added(beside.added)
    codec = SentencePiece(proto, vocabulary, beside.chat_template)
    model = codec.sp_model
    controls = Controls(model.bos_id(), model.eos_id(), model.pad_id(), add_bos=True)
    return codec, beside.controls(controls, codec.special_tokens)


class SentencePiece:
    """A sentencepiece model. `sp_model` is the model as it is; encoding needs a copy if it would find markup."""

    def __init__(
        self,
        proto: bytes,
        vocabulary: Vocabulary,
        chat_template: str | None = None,
        prefix: str | None = None,
    ) -> None:
        """`vocabulary`: what the proto holds, and what was added to it.

        `prefix`: where transformers puts a space in front, of texts that do not begin with one: of each ("always"), of
        the one that begins a prompt ("first"), or of none ("never"). None: of every text, where the model does that.
        """
        from sentencepiece import SentencePieceProcessor

        self.sp_model = SentencePieceProcessor(model_proto=proto)
        self.tokens = vocabulary
        self._is_bpe = trainer_type(proto) == BPE
        self._unknown: str = self.sp_model.decode([self.sp_model.unk_id()])
        self.n_words = len(vocabulary.tokens)
        self.special_tokens = vocabulary.special_tokens(chat_template)
        held = self.sp_model.vocab_size()
        hidden = {id for id in self.special_tokens.values() if id < held and not self.sp_model.is_control(id)}
        hiding = with_control_pieces(proto, hidden) if hidden else proto
        self._encode = SentencePieceProcessor(model_proto=hiding).encode if hidden else self.sp_model.encode
        if vocabulary.prefix is not None:  # of a field that stands twice the parts count that come last
            bare = hiding + _field(3, _field(3, False))
            self._encode_bare = SentencePieceProcessor(model_proto=bare).encode
        self._cutter = needed_cutter(vocabulary, self.special_tokens)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(self._cutter.cut(pieces) if self._cutter else pieces):
            if isinstance(piece, int):
                ids.append(piece)
            elif self.tokens.prefix is None or self._is_spaced(piece, number):
                ids += self._encode(piece)
            else:
                ids += self._encode_bare(piece)
        return ids

    def _is_spaced(self, text: str, number: int) -> bool:
        """Whether transformers puts a space in front of this piece of a prompt."""
        place = self.tokens.prefix == "always" or (self.tokens.prefix == "first" and number == 0)
        return place and not text.startswith((" ", "▁"))

    def token_bytes(self, id: int) -> bytes:
        type = self.tokens.types[id]
        if type == TokenType.UNKNOWN:
            return self._unknown.encode()
        return piece_bytes(self.tokens.tokens[id], type)

    def stream(self) -> PieceStream:
        return PieceStream(self.tokens, unknown=self._unknown)

    def vocabulary(self) -> Vocabulary:
        if not self._is_bpe:
            raise TokenizerError("this sentencepiece model is not BPE: a GGUF vocabulary cannot tokenize like it")
        return self.tokens


# --- the file -----------------------------------------------------------------------------------------------------


def read_proto(proto: bytes) -> Vocabulary:
    """The vocabulary of a ModelProto."""
    fields = list(_fields(proto))
    pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    normalizer = dict(_fields(dict(fields).get(3, b"")))
    return Vocabulary(
        kind="spm",
        tokens=[piece[1].decode() for piece in pieces],
        types=[piece.get(3, int(TokenType.NORMAL)) for piece in pieces],
        scores=[struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
        add_space_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
    )


def trainer_type(proto: bytes) -> int:
    """What kind of model a ModelProto is, by sentencepiece's number."""
    return dict(_fields(dict(_fields(proto)).get(2, b""))).get(3, 1)


def write_proto(vocabulary: Vocabulary, ids: Mapping[str, int]) -> bytes:
    """A ModelProto; `ids` are those of "unk", "bos", "eos" and "pad", -1 for one that there is not."""
    rows = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    pieces = (_piece(token.encode(), score, type) for token, score, type in rows)
    trainer = [_field(3, BPE), _field(35, TokenType.BYTE in vocabulary.types)]  # model_type, byte_fallback
    for number, name in enumerate(("unk", "bos", "eos", "pad")):
        trainer.append(_field(40 + number, ids[name]))
        if ids[name] >= 0:
            trainer.append(_field(45 + number, vocabulary.tokens[ids[name]].encode()))
    normalizer = [
        _field(1, b"identity"),
        _field(2, vocabulary.charsmap),
        _field(3, vocabulary.add_space_prefix),
        _field(4, vocabulary.remove_extra_whitespaces),
    ]
    return b"".join([*pieces, _field(2, b"".join(trainer)), _field(3, b"".join(normalizer))])


def with_control_pieces(proto: bytes, ids: set[int]) -> bytes:
    """The ModelProto with these pieces marked as control, which are never found in text."""
    fields = list(_fields(proto))
    pieces = [value for number, value in fields if number == 1]
    control = _field(3, TokenType.CONTROL)  # a second value of a protobuf field overrides the first
    parts = [_field(1, piece + control * (id in ids)) for id, piece in enumerate(pieces)]
    return b"".join(parts + [_field(number, value) for number, value in fields if number != 1])


def with_added_pieces(proto: bytes, vocabulary: Vocabulary) -> bytes:
    """The ModelProto with the tokens that `vocabulary` has beyond it, and its control tokens marked as such."""
    held = read_proto(proto).types
    rows = zip(vocabulary.tokens[len(held) :], vocabulary.types[len(held) :], strict=True)
    added = b"".join(_piece(token.encode(), 0.0, type) for token, type in rows)
    marked = {id for id in vocabulary.of_type(TokenType.CONTROL).values() if id < len(held)}
    marked -= {id for id, type in enumerate(held) if type == TokenType.CONTROL}
    return (with_control_pieces(proto, marked) if marked else proto) + added


def _piece(token: bytes, score: float, type: int) -> bytes:
    """One piece of a ModelProto: token, score, type."""
    body = b"\n%b%b\x15%b\x18%b" % (_varint(len(token)), token, struct.pack("<f", score), _varint(type))
    return b"\n%b%b" % (_varint(len(body)), body)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) fields of one protobuf message: int for varints, bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
            yield tag >> 3, message[at : at + size]
            at += size


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: an int as a varint, bytes with their length."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes((value,))
    value &= 2**64 - 1
    groups = [(value >> shift) & 0x7F for shift in range(0, value.bit_length(), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
