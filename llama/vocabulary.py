"""What a vocabulary is, and how files keep one: sentencepiece models, GGUF metadata, Hugging Face's tokenizer.json.

Nothing here tokenizes; `tokenizer` does. Files are not trusted: sizes and numbers are checked before they are used.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class TokenizerError(ValueError):
    """A file that holds no vocabulary, or one that is damaged or of an unknown kind."""


class TokenType(IntEnum):
    """What a token is: the numbers that sentencepiece's ModelProto and GGUF's `token_type` share."""

    NORMAL = 1
    UNKNOWN = 2  # stands for text that the vocabulary cannot express
    CONTROL = 3
    USER_DEFINED = 4  # added later, and shown as text
    UNUSED = 5
    BYTE = 6  # "<0x41>" in sentencepiece vocabularies


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with all that another file needs to tokenize alike.

    kind "spm": `tokens` are sentencepiece pieces ("▁" is a space); neighbours that make a piece are joined, the one
    with the highest of `scores` first.
    kind "bpe": `tokens` are bytes in GPT-2's printable alphabet, joined by `merges` ("left right", best first) within
    words that are cut by the rule of `PRE_TOKENIZERS` named `pre`.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""  # sentencepiece's compiled normalisation; empty in Meta's files

    def special_tokens(self) -> dict[str, int]:
        """Every token that text must not become: control tokens, and added ones.

        An added token that is white space or a single character controls nothing (some vocabularies add runs of
        spaces), and stays text.
        """

        def is_special(token: str, type: int) -> bool:
            is_markup = len(token.strip("▁ \t\r\n")) > 1
            return type == TokenType.CONTROL or (type == TokenType.USER_DEFINED and is_markup)

        rows = enumerate(zip(self.tokens, self.types, strict=True))
        return {token: id for id, (token, type) in rows if is_special(token, type)}

    def to_gguf(self) -> dict[str, Any]:
        """The GGUF metadata that keeps this vocabulary: key -> string, bool, or list of one type."""
        fields = {
            "tokenizer.ggml.model": {"spm": "llama", "bpe": "gpt2"}[self.kind],
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": [int(type) for type in self.types],
            "tokenizer.ggml.scores": self.scores,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.add_space_prefix": self.add_space_prefix,
            "tokenizer.ggml.remove_extra_whitespaces": self.remove_extra_whitespaces,
            "tokenizer.ggml.precompiled_charsmap": list(self.charsmap),
        }
        return {key: value for key, value in fields.items() if value != []}

    @staticmethod
    def from_gguf(fields: Mapping[str, Any]) -> Vocabulary:
        """Read what `to_gguf` writes and what llama.cpp's converters write. Raises TokenizerError."""
        model = fields.get("tokenizer.ggml.model")
        if model not in ("llama", "gpt2"):
            raise TokenizerError(f'tokenizer.ggml.model is {model!r}; "llama" and "gpt2" are known')
        is_spm = model == "llama"
        tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(fields["tokenizer.ggml.tokens"])]
        types = fields.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
        scores = fields.get("tokenizer.ggml.scores", [0.0] * len(tokens))
        if not len(tokens) == len(types) == len(scores):
            raise TokenizerError("the lists of tokens, types and scores differ in length")
        for values, kind in ((tokens, str), (types, int), (scores, (int, float))):
            if not all(isinstance(value, kind) for value in values):
                raise TokenizerError("the lists of tokens, types and scores hold values of a wrong type")
        return Vocabulary(
            kind="spm" if is_spm else "bpe",
            tokens=tokens,
            types=_mended_types(types, fields, is_spm),
            scores=scores,
            merges=fields.get("tokenizer.ggml.merges", []),
            pre=fields.get("tokenizer.ggml.pre", "default"),
            add_space_prefix=fields.get("tokenizer.ggml.add_space_prefix", is_spm),
            remove_extra_whitespaces=fields.get("tokenizer.ggml.remove_extra_whitespaces", False),
            charsmap=bytes(value & 0xFF for value in fields.get("tokenizer.ggml.precompiled_charsmap", ())),
        )


def gguf_token_id(fields: Mapping[str, Any], name: str) -> int:
    """The id of the "bos", "eos", "eot", "eom", "padding" or "unknown" token in GGUF metadata, -1 for none.

    As in llama.cpp, an id outside the vocabulary is none, and a sentencepiece vocabulary has three by default.
    """
    defaults = {"unknown": 0, "bos": 1, "eos": 2} if fields["tokenizer.ggml.model"] == "llama" else {}
    id = fields.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name, -1))
    return id if isinstance(id, int) and 0 <= id < len(fields["tokenizer.ggml.tokens"]) else -1


def _mended_types(types: Sequence[int], fields: Mapping[str, Any], is_spm: bool) -> list[int]:
    """Files leave control tokens typed as NORMAL, and several as UNKNOWN where sentencepiece wants exactly one."""
    types = list(types)
    for name in ("bos", "eos", "eot", "eom"):
        id = gguf_token_id(fields, name)
        if id >= 0 and types[id] == TokenType.NORMAL:
            types[id] = int(TokenType.CONTROL)
    if is_spm:
        unknown, *others = [id for id, type in enumerate(types) if type == TokenType.UNKNOWN] or [
            gguf_token_id(fields, "unknown")
        ]
        types[unknown] = int(TokenType.UNKNOWN)
        for id in others:
            types[id] = int(TokenType.UNUSED)
    return types


# --- byte-level vocabularies ------------------------------------------------------------------------------------


class PreTokenizer(NamedTuple):
    """How a byte-level vocabulary cuts text into words: patterns applied in turn, each to the pieces of the last."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever its merges say
    add_bos: bool = False  # what a GGUF file means that does not say
    cut_long_runs: bool = False  # as Meta's own tokenizer for Llama 3 does


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER_PATTERNS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")

_RULES: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (("llama-bpe", "llama3", "llama-v3"), PreTokenizer((LLAMA3_PATTERN,), True, True, cut_long_runs=True)),
    (("falcon3", "pixtral"), PreTokenizer((LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)),
    (("smaug-bpe", "dbrx"), PreTokenizer((LLAMA3_PATTERN,))),
    (("smollm", "starcoder", "refact", "command-r", "exaone"), PreTokenizer((r"\p{N}", GPT2_PATTERN))),
    (("gpt-2", "phi-2", "mpt", "olmo"), PreTokenizer((GPT2_PATTERN,))),
    (("qwen2", "deepseek-r1-qwen", "stablelm2"), PreTokenizer((QWEN2_PATTERN,))),
    (("tekken",), PreTokenizer((TEKKEN_PATTERN,), ignore_merges=True, add_bos=True)),
    (("deepseek-coder",), PreTokenizer(DEEPSEEK_CODER_PATTERNS)),
    (("falcon",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, "[0-9][0-9][0-9]"))),
    (("default",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"))),
)
# By the name in a GGUF file's `tokenizer.ggml.pre` (names and rules: llama.cpp, src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: rule for names, rule in _RULES for name in names}


def _printable_bytes() -> list[str]:
    """GPT-2's alphabet: the character that stands for each byte (printable Latin-1, then U+0100 and on)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


CHAR_OF_BYTE: list[str] = _printable_bytes()
BYTE_OF_CHAR: dict[str, int] = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}


# --- sentencepiece's ModelProto (field numbers: its sentencepiece_model.proto) ----------------------------------


def proto_fields(message: bytes) -> Iterator[tuple[int, Any]]:
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


def proto_field(number: int, value: int | float | bytes) -> bytes:
    """One protobuf field: an int as a varint, a float as 32 bits, bytes with their length."""

    def varint(value: int) -> bytes:
        value &= 2**64 - 1
        groups = [(value >> shift) & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
        return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def is_bpe_proto(proto: bytes) -> bool:
    """Whether a ModelProto is BPE, as Meta's are; sentencepiece has other models, with no place in GGUF's "llama"."""
    trainer = dict(proto_fields(dict(proto_fields(proto)).get(2, b"")))
    return trainer.get(3, 1) == 2


def vocabulary_from_proto(proto: bytes) -> Vocabulary:
    """Read a ModelProto."""
    fields = list(proto_fields(proto))
    pieces = [dict(proto_fields(value)) for number, value in fields if number == 1]
    normalizer = dict(proto_fields(dict(fields).get(3, b"")))
    return Vocabulary(
        kind="spm",
        tokens=[piece[1].decode() for piece in pieces],
        types=[piece.get(3, int(TokenType.NORMAL)) for piece in pieces],
        scores=[struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
        add_space_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
    )


def proto_from_vocabulary(vocabulary: Vocabulary, ids: Mapping[str, int]) -> bytes:
    """Write a ModelProto; `ids` are those of "unk", "bos", "eos" and "pad", -1 for one that there is not."""
    rows = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    pieces = [
        proto_field(1, token.encode()) + proto_field(2, float(score)) + proto_field(3, type)
        for token, score, type in rows
    ]
    trainer = [proto_field(3, 2), proto_field(35, TokenType.BYTE in vocabulary.types)]  # BPE, byte_fallback
    for number, name in enumerate(("unk", "bos", "eos", "pad")):
        trainer.append(proto_field(40 + number, ids[name]))
        if ids[name] >= 0:
            trainer.append(proto_field(45 + number, vocabulary.tokens[ids[name]].encode()))
    normalizer = [
        proto_field(1, b"identity"),
        proto_field(2, vocabulary.charsmap),
        proto_field(3, vocabulary.add_space_prefix),
        proto_field(4, vocabulary.remove_extra_whitespaces),
    ]
    parts = [proto_field(1, piece) for piece in pieces]
    return b"".join([*parts, proto_field(2, b"".join(trainer)), proto_field(3, b"".join(normalizer))])


def with_control_pieces(proto: bytes, ids: set[int]) -> bytes:
    """The ModelProto with these pieces marked as control, which are never found in text."""
    fields = list(proto_fields(proto))
    pieces = [value for number, value in fields if number == 1]
    control = proto_field(3, TokenType.CONTROL)  # a second value of a protobuf field overrides the first
    parts = [proto_field(1, piece + control * (id in ids)) for id, piece in enumerate(pieces)]
    return b"".join(parts + [proto_field(number, value) for number, value in fields if number != 1])


# --- GGUF -------------------------------------------------------------------------------------------------------


_SCALARS = dict(enumerate("BbHhIif?")) | dict(
    enumerate("Qqd", start=10)
)  # struct's formats of the value types
_STRING, _ARRAY = 8, 9


class _GGUFHeader:
    """Walks the key-value part of a GGUF file. A length is compared with the file's before anything is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size

    def bytes(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise TokenizerError("the file ends inside its metadata")
        return self._file.read(size)

    def numbers(self, format: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{format}", self.bytes(struct.calcsize(f"<{format}") * count))

    def string(self) -> str:
        return self.bytes(int.from_bytes(self.bytes(8), "little")).decode()

    def value(self) -> Any:
        kind = self.numbers("I")[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(self._format(kind))[0]
        kind, count = self.numbers("I")[0], self.numbers("Q")[0]
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.numbers(self._format(kind), count))

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise TokenizerError(f"unknown type {kind} of a metadata value")
        return _SCALARS[kind]


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a GGUF file (versions 2 and 3, little-endian), as Python values; the tensors are not touched.

    Source: ggml's docs/gguf.md. Raises TokenizerError.
    """
    with open(path, "rb") as file:
        header = _GGUFHeader(file)
        magic, version, _, num_fields = header.bytes(4), *header.numbers("I"), *header.numbers("Q", 2)
        if magic != b"GGUF" or version not in (2, 3):
            raise TokenizerError(f"not little-endian GGUF of version 2 or 3: {magic!r}, version {version}")
        fields = {}
        for _ in range(num_fields):
            key = header.string()
            fields[key] = header.value()
        return fields


# --- Hugging Face's tokenizer.json ------------------------------------------------------------------------------


def _steps(node: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """The steps of one part of a tokenizer.json, with its Sequences laid flat."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for child in node[children] for step in _steps(child, children)]


_PIECE_ENCODERS = {"Replace", "Prepend", "Metaspace"}  # how sentencepiece-like files turn spaces into "▁"


def _is_piece_step(step: dict[str, Any]) -> bool:
    """Whether a step of a decoder is one that turns sentencepiece's pieces into text."""
    if step["type"] == "Replace":
        return step["pattern"] == {"String": "▁"} and step["content"] == " "
    return step["type"] in ("ByteFallback", "Fuse", "Strip", "Metaspace")


class TokenizerJson:
    """A tokenizer.json, as the dict `spec`: byte-level or sentencepiece-like, BPE or Unigram.

    `is_byte_level` says which; `vocabulary` holds its tokens, and is without merges and scores until
    `full_vocabulary` derives them. Raises TokenizerError, or what Python raises for a dict that is no tokenizer.json.
    """

    def __init__(self, spec: dict[str, Any], vocabulary: Vocabulary | None = None) -> None:
        self.spec = spec
        model, decoders = spec["model"], _steps(spec.get("decoder"), "decoders")
        if isinstance(model["vocab"], dict) and "merges" not in model:
            raise TokenizerError(f"a model of type {model.get('type')} is not known; BPE and Unigram are")
        self.is_byte_level = [step["type"] for step in decoders] == ["ByteLevel"]
        if not self.is_byte_level and not (decoders and all(_is_piece_step(step) for step in decoders)):
            names = [step["type"] for step in decoders]
            raise TokenizerError(
                f"the decoder {names} is not known; byte-level and sentencepiece-like ones are"
            )
        # A decoder that takes a space away in front belongs to an encoder that puts one there.
        strips = any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in decoders
        )
        self.vocabulary = vocabulary or self._read_tokens(add_space_prefix=strips)

    def _read_tokens(self, add_space_prefix: bool) -> Vocabulary:
        """Tokens and types by id. Ids that nothing uses become tokens of type UNUSED."""
        model, added = self.spec["model"], self.spec.get("added_tokens") or []
        vocab = model["vocab"]
        known = vocab if isinstance(vocab, dict) else {piece: id for id, (piece, _) in enumerate(vocab)}
        ids = [*known.values(), *(token["id"] for token in added)]
        if not all(type(id) is int and 0 <= id < 2**22 for id in ids):
            raise TokenizerError("a token's id is not a number from 0 to 4194303")
        tokens = [f"[PAD{id}]" for id in range(max(ids, default=-1) + 1)]
        types = [int(TokenType.UNUSED)] * len(tokens)
        for token, id in known.items():
            is_byte = not self.is_byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token)
            tokens[id], types[id] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
        for token in added:
            tokens[token["id"]] = token["content"]
            types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        unknown = known.get(model.get("unk_token")) if isinstance(vocab, dict) else model.get("unk_id")
        if unknown is not None and not self.is_byte_level:
            types[unknown] = int(TokenType.UNKNOWN)
        return Vocabulary(
            "bpe" if self.is_byte_level else "spm", tokens, types, add_space_prefix=add_space_prefix
        )

    def plain(self) -> dict[str, Any]:
        """A tokenizer.json that encodes text alike and has no way to make a special token of it.

        Special tokens (and the unknown one, by its name) go from its added tokens, vocabulary and merges; its own
        BOS, EOS, truncation and padding too.
        """
        special = self.vocabulary.special_tokens()
        rows = enumerate(zip(self.vocabulary.tokens, self.vocabulary.types, strict=True))
        hidden = special | {token: id for id, (token, type) in rows if type == TokenType.UNKNOWN}
        model = dict(self.spec["model"])
        added = [token for token in self.spec.get("added_tokens") or [] if token["content"] not in hidden]
        if isinstance(model["vocab"], dict):
            vocab = {token: id for token, id in model["vocab"].items() if token not in special}
            # An added token takes its id from the model's vocabulary, if it is there, and else the next free one.
            model["vocab"] = vocab | {token["content"]: token["id"] for token in added}
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [pair for pair in merges if hidden.keys().isdisjoint((*pair, "".join(pair)))]
        else:  # Unigram: an id is a place in a list, so the piece stays, under a name that nobody can type
            ids, added = set(hidden.values()), []
            model["vocab"] = [
                [secrets.token_hex(16) if id in ids else piece, score]
                for id, (piece, score) in enumerate(model["vocab"])
            ]
        if self.is_byte_level:
            model["unk_token"] = None  # GPT-2's is also its end of text
        removed = {"truncation": None, "padding": None, "post_processor": None}
        return self.spec | removed | {"model": model, "added_tokens": added}

    def first_token(self) -> str | None:
        """The token that the file's own post-processor puts in front of a text, if any."""
        for step in _steps(self.spec.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
                return step["single"][0]["SpecialToken"]["id"]
        return None

    def full_vocabulary(self) -> Vocabulary:
        """The vocabulary with what GGUF needs to tokenize alike. Raises TokenizerError where it could not."""
        if self.vocabulary.merges:
            return self.vocabulary
        merges = self.spec["model"].get("merges")
        normalizers = {step["type"] for step in _steps(self.spec.get("normalizer"), "normalizers")}
        splitters = {step["type"] for step in _steps(self.spec.get("pre_tokenizer"), "pretokenizers")}
        known = normalizers <= {"NFC"} if self.is_byte_level else (normalizers | splitters) <= _PIECE_ENCODERS
        if merges is None or not known:
            raise TokenizerError(
                "GGUF cannot say how it tokenizes: it is not BPE, or it changes text in some other way"
            )
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        if self.is_byte_level:
            return replace(self.vocabulary, merges=[" ".join(pair) for pair in pairs], pre=self._find_pre())
        order: dict[str, int] = {}  # a piece is as good as the first merge that makes it
        for pair in pairs:
            order.setdefault("".join(pair), len(order))
        scores = [-float(order.get(token, len(order))) for token in self.vocabulary.tokens]
        return replace(self.vocabulary, scores=scores)

    def _find_pre(self) -> str:
        """The name of the rule in `PRE_TOKENIZERS` that cuts words as this file does."""
        patterns: list[str | None] = []
        for step in _steps(self.spec.get("pre_tokenizer"), "pretokenizers"):
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
                patterns.append(step["pattern"].get("Regex"))
            elif step["type"] == "Digits" and step["individual_digits"]:
                patterns.append(r"\p{N}")
            elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
                patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
            else:
                patterns.append(None)
        rule = (tuple(patterns), bool(self.spec["model"].get("ignore_merges")))
        for name, known in PRE_TOKENIZERS.items():
            if rule == (known.patterns, known.ignore_merges):
                return name
        raise TokenizerError("GGUF cannot say how it tokenizes: it cuts words by a rule that has no name")

    @staticmethod
    def from_vocabulary(vocabulary: Vocabulary, rule: PreTokenizer) -> TokenizerJson:
        """A byte-level vocabulary, as from a GGUF file, as a tokenizer.json."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        steps = [*(split | {"pattern": {"Regex": pattern}} for pattern in rule.patterns), byte_level]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        rows = list(zip(vocabulary.tokens, range(len(vocabulary.tokens)), vocabulary.types, strict=True))
        spec = {
            "version": "1.0",
            "added_tokens": [
                {"id": id, "content": token, "special": type == TokenType.CONTROL, **flags}
                for token, id, type in rows
                if type in (TokenType.CONTROL, TokenType.USER_DEFINED)
            ],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {token: id for token, id, type in rows if type == TokenType.NORMAL},
                "merges": vocabulary.merges,
                "ignore_merges": rule.ignore_merges,
            },
        }
        return TokenizerJson(spec, vocabulary)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TokenizerError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is not a JSON object")
    return value
