"""A checkpoint's tokenizer: where it lies, and what of it each format's files hold."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.gguf import BOOL, FLOAT32, INT32, STRING, UINT8, UINT32, Value
from ..files.json import json_bytes
from ..tokenizer import Tokenizer
from ..vocabulary import (
    BYTE_OF_CHAR,
    PRE_TOKENIZERS,
    TokenizerJson,
    TokenType,
    Vocabulary,
    proto_from_vocabulary,
)

NAMES = ("tokenizer.model", "tokenizer.json")
HF_NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
NUM_LLAMA3_CONTROLS = 256


def find_tokenizer(path: Path, names: tuple[str, ...] = NAMES) -> Path | None:
    """The tokenizer inside a checkpoint directory, or one directory above it as in Meta's layout."""
    for folder in (path, path.absolute().parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


class TokenizerFiles:
    """The tokenizer at `path`, as the files that each format keeps beside (or inside) its weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer = Tokenizer(str(path))
        self.warnings: list[str] = []
        beside = path.parent / "tokenizer.model"
        self._proto: bytes | None = None
        if self.tokenizer.sp_model is not None:
            self._proto = self.tokenizer.sp_model.serialized_model_proto()
        elif self.tokenizer.kind == "tokenizer.json" and beside.is_file():
            self._proto = _sentencepiece(beside)

    @property
    def is_sentencepiece(self) -> bool:
        """Whether `for_meta` gives a sentencepiece model, the only kind that Meta's Llama 2 code reads."""
        return self._proto is not None or self.tokenizer.vocabulary().kind == "spm"

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id if self.tokenizer.bos_id >= 0 else None

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.tokenizer.eos_id >= 0 else None

    def for_meta(self) -> dict[str, bytes]:
        """`tokenizer.model`, sentencepiece's or tiktoken's; where neither can say it, Hugging Face's files."""
        template = (
            {"tokenizer_config.json": json_bytes(self._config())} if self.tokenizer.chat_template else {}
        )
        if self.tokenizer.kind == "tiktoken":
            return {"tokenizer.model": self.path.read_bytes()} | template
        if self.is_sentencepiece:
            return {"tokenizer.model": self._proto or self._proto_from_pieces()} | template
        vocabulary = self.tokenizer.vocabulary()
        if _is_llama3(vocabulary):
            return {"tokenizer.model": b"".join(_tiktoken_lines(vocabulary))} | template
        return self.for_huggingface()

    def for_huggingface(self) -> dict[str, bytes]:
        """The files as they are where the checkpoint has them; else a tokenizer.json that tokenizes alike."""
        if self.tokenizer.kind == "tokenizer.json":
            present = [self.path.parent / name for name in HF_NAMES if (self.path.parent / name).is_file()]
            return {file.name: file.read_bytes() for file in present}
        files = {"tokenizer_config.json": json_bytes(self._config())}
        if self._proto is not None:
            files["tokenizer.model"] = self._proto
        vocabulary = self.tokenizer.vocabulary()
        if vocabulary.kind == "spm" and (vocabulary.charsmap or vocabulary.remove_extra_whitespaces):
            self.warnings.append(
                "no tokenizer.json is written for a sentencepiece model that normalizes text"
            )
            return files
        spec = self._pieces_spec(vocabulary) if vocabulary.kind == "spm" else _byte_level_spec(vocabulary)
        spec["post_processor"] = self._bos_in_front(vocabulary, spec.get("post_processor"))
        return files | {"tokenizer.json": json_bytes(spec)}

    def for_gguf(self, vocab_size: int, stop_ids: tuple[int, ...]) -> dict[str, Value]:
        """The `tokenizer.*` metadata, with as many tokens as the embedding has rows."""
        fields = dict(self.tokenizer.gguf_metadata())
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        if len(tokens) > vocab_size:
            self.warnings.append(
                f"the last {len(tokens) - vocab_size} tokens have no embedding and are left out"
            )
        padding = range(len(tokens), vocab_size)
        fields["tokenizer.ggml.tokens"] = tokens[:vocab_size] + [f"[PAD{id}]" for id in padding]
        fields["tokenizer.ggml.token_type"] = types[:vocab_size] + [int(TokenType.UNUSED) for _ in padding]
        if scores := fields.get("tokenizer.ggml.scores"):
            fields["tokenizer.ggml.scores"] = scores[:vocab_size] + [0.0 for _ in padding]
        if TokenType.UNKNOWN in types:
            fields["tokenizer.ggml.unknown_token_id"] = types.index(TokenType.UNKNOWN)
        others = [id for id in stop_ids if id != self.tokenizer.eos_id]
        for name, id in zip(("eot", "eom"), others, strict=False):
            fields[f"tokenizer.ggml.{name}_token_id"] = id
        return {key: _value(key, value) for key, value in fields.items()}

    def _config(self) -> dict[str, Any]:
        """tokenizer_config.json, for a tokenizer.json to be used as it is."""
        tokenizer = self.tokenizer
        names = {id: token for token, id in tokenizer.special_tokens.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        config: dict[str, Any] = {name: names[id] for name, id in ids.items() if id in names}
        config |= {
            "add_bos_token": tokenizer.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if tokenizer.chat_template is not None:
            config["chat_template"] = tokenizer.chat_template
        return config

    def _proto_from_pieces(self) -> bytes:
        """A sentencepiece model from a tokenizer.json of pieces."""
        vocabulary = self.tokenizer.vocabulary()
        unknown = vocabulary.types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in vocabulary.types else 0
        ids = {"unk": unknown, "bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "pad": -1}
        return proto_from_vocabulary(vocabulary, ids)

    def _pieces_spec(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """A sentencepiece vocabulary as a tokenizer.json: byte-fallback BPE, as transformers writes Llama's."""
        unknown = next(
            (t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == 2), None
        )
        prepend = [{"type": "Prepend", "prepend": "▁"}] if vocabulary.add_space_prefix else []
        strip = (
            [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.add_space_prefix else []
        )
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(vocabulary),
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {token: id for id, token in enumerate(vocabulary.tokens)},
                "merges": [list(pair) for pair in _merges(vocabulary)],
            },
        }

    def _bos_in_front(self, vocabulary: Vocabulary, otherwise: Any) -> Any:
        """The post-processor that puts BOS in front of a text, where this tokenizer does."""
        if not self.tokenizer.add_bos:
            return otherwise
        bos = vocabulary.tokens[self.tokenizer.bos_id]
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, pair = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
        return {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, pair],
            "special_tokens": {bos: {"id": bos, "ids": [self.tokenizer.bos_id], "tokens": [bos]}},
        }


def _sentencepiece(path: Path) -> bytes | None:
    """The sentencepiece model at `path`; None for a file of another kind."""
    model = Tokenizer(str(path)).sp_model
    return None if model is None else path.read_bytes()


def _merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best score first: how sentencepiece joins, as a list of merges."""
    usable = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED}
    rows = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    scores = {token: score for token, score, kind in rows if kind in usable}
    pairs = (
        (-score, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    )
    return ((left, right) for _, left, right in sorted(pairs))


def _byte_level_spec(vocabulary: Vocabulary) -> dict[str, Any]:
    """A byte-level vocabulary as a tokenizer.json with every token, also the control ones, under its own id."""
    spec = TokenizerJson.from_vocabulary(vocabulary, PRE_TOKENIZERS[vocabulary.pre]).spec
    model = spec["model"] | {"vocab": {token: id for id, token in enumerate(vocabulary.tokens)}}
    return {"truncation": None, "padding": None, "normalizer": None} | spec | {"model": model}


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return [
        {"id": id, "content": token, **flags, "special": kind != TokenType.USER_DEFINED}
        for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in kinds
    ]


def _is_llama3(vocabulary: Vocabulary) -> bool:
    """Whether Meta's tiktoken file can hold this: tokens ranked in the order of their merges, then 256 controls."""
    count = len(vocabulary.tokens) - NUM_LLAMA3_CONTROLS
    if vocabulary.pre != "llama-bpe" or count < 256:
        return False
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    made = [ids.get(merge.replace(" ", ""), -1) for merge in vocabulary.merges]
    kinds_fit = all(kind == TokenType.NORMAL for kind in vocabulary.types[:count]) and all(
        kind != TokenType.NORMAL for kind in vocabulary.types[count:]
    )
    return kinds_fit and made == sorted(made)


def _tiktoken_lines(vocabulary: Vocabulary) -> Iterator[bytes]:
    for rank, token in enumerate(vocabulary.tokens[:-NUM_LLAMA3_CONTROLS]):
        data = bytes(BYTE_OF_CHAR[char] for char in token)
        yield base64.b64encode(data) + b" %d\n" % rank


def _value(key: str, value: Any) -> Value:
    """A metadata value in the GGUF type that llama.cpp expects for it."""
    kinds = {str: STRING, bool: BOOL, int: UINT32, float: FLOAT32}
    if not isinstance(value, list):
        return Value(kinds[type(value)], value)
    if key.endswith("charsmap"):
        return Value(UINT8, value)
    first = value[0] if value else 0
    return Value({str: STRING, float: FLOAT32}.get(type(first), INT32), value)
