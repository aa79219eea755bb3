"""Hugging Face's tokenizer.json: byte-level or sentencepiece-like, BPE or Unigram; read, run and written."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .added import AddedToken, Matching, Names, Piece
from .beside import STARTS, TURN_ENDS, first_known, read_beside, read_object
from .byte_level import BYTE_OF_CHAR, GPT2_PATTERN, PRE_TOKENIZERS, ByteStream, PreTokenizer
from .pieces import PieceStream, merges, piece_bytes
from .tiktoken import cut_long_runs
from .vocabulary import Codec, Controls, TokenizerError, TokenType, Vocabulary, validate_id

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models

LONG_TEXT = 2048  # characters from which on other threads run meanwhile: only a batch lets go of the interpreter
PIECE_ENCODERS = {"Replace", "Prepend", "Metaspace"}
"""How sentencepiece-like files turn spaces into "▁"."""


def from_tokenizer_json(path: Path, chat_template: str | None = None) -> tuple[Codec, Controls]:
    """The tokenizer in a file, with what the files beside it say."""
    spec = read_object(path)
    if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise TokenizerError("JSON, but no tokenizer.json: it has no model with a vocabulary")
    beside = read_beside(path.parent, chat_template)
    source = TokenizerJson(spec, prefix=beside.prefix)
    codec = Tokenizers(source, source.vocabulary.with_added(beside.added), beside.chat_template)
    first = source.first_token()
    bos_id = first_known((first, *STARTS), codec.special_tokens)
    controls = Controls(bos_id, first_known(TURN_ENDS, codec.special_tokens), add_bos=first is not None)
    return codec, beside.controls(controls, codec.special_tokens)


class Tokenizers:
    """A tokenizer.json, run by the tokenizers library, with every special token under a name that nobody can type.

    Only encoding is the library's; decoding is done here, because it has to stream.
    """

    sp_model = None

    def __init__(
        self,
        source: TokenizerJson,
        vocabulary: Vocabulary,
        chat_template: str | None = None,
        cuts_long_runs: bool = False,
    ) -> None:
        """`vocabulary`: that of `source`, and what was added to it elsewhere."""
        self._source, self.tokens = source, vocabulary
        self._cuts_long_runs = cuts_long_runs
        self.n_words = len(vocabulary.tokens)
        self.special_tokens = vocabulary.special_tokens(chat_template)
        self._names = Names(self.special_tokens)
        self._model, self._ids = source.library(vocabulary, self.special_tokens, self._names)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        placed = [piece for piece in pieces if isinstance(piece, int)]
        if self._cuts_long_runs:  # of a byte-level vocabulary, whose texts do not act on each other
            return [id for piece in pieces for id in self._encode_alone(piece)]
        ids = self._encode(self._names.join(pieces))
        if placed and placed != [id for id in ids if id in self._names.by_id]:
            # A token that is found only as a word of its own, say, and was placed beside one.
            return [id for piece in pieces for id in self._encode_alone(piece)]
        return ids

    def _encode_alone(self, piece: Piece) -> list[int]:
        if isinstance(piece, int):
            return [piece]
        parts = cut_long_runs(piece) if self._cuts_long_runs else (piece,)
        return [id for part in parts for id in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        if len(text) < LONG_TEXT:
            ids = self._model.encode(text, add_special_tokens=False).ids
        else:
            ids = self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [self._ids.get(id, id) for id in ids] if self._ids else ids

    def token_bytes(self, id: int) -> bytes:
        token, type = self.tokens.tokens[id], self.tokens.types[id]
        if type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED):
            return b""
        if not self._source.is_byte_level:
            return piece_bytes(token, type)
        if type == TokenType.USER_DEFINED:
            return token.encode()
        try:
            return bytes(BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # a token that is not written in the alphabet of bytes is text as it is
            return token.encode()

    def stream(self) -> ByteStream | PieceStream:
        if self._source.is_byte_level:
            return ByteStream(self.token_bytes)
        return PieceStream(self.tokens, unknown="")

    def vocabulary(self) -> Vocabulary:
        return self._source.full(self.tokens)


class TokenizerJson:
    """A tokenizer.json, as the dict `spec`.

    `is_byte_level` says which of the two it is; `vocabulary` holds its tokens, and is without merges and scores until
    `full` derives them. Raises TokenizerError, or what Python raises for a dict that is no tokenizer.json.
    """

    def __init__(self, spec: dict[str, Any], vocabulary: Vocabulary | None = None, prefix: str | None = None) -> None:
        """`prefix`: where sentencepiece-like text gets a space in front, "first", "always" or "never", whatever the
        file says; None: as the file says.
        """
        self.spec = spec
        model, decoders = spec["model"], _steps(spec.get("decoder"), "decoders")
        if isinstance(model["vocab"], dict) and "merges" not in model:
            raise TokenizerError(f"a model of type {model.get('type')} is not known; BPE and Unigram are")
        self.is_byte_level = [step["type"] for step in decoders] == ["ByteLevel"]
        if not self.is_byte_level and not (decoders and all(_is_piece_step(step) for step in decoders)):
            names = [step["type"] for step in decoders]
            raise TokenizerError(f"the decoder {names} is not known; byte-level and sentencepiece-like ones are")
        if prefix is not None and not self.is_byte_level:
            self.spec = spec | _llama_steps(prefix)
            decoders = _steps(self.spec["decoder"], "decoders")
        # A decoder that takes a space away in front belongs to an encoder that puts one there.
        strips = any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in decoders
        )
        self.vocabulary = vocabulary or self._read_tokens(add_space_prefix=strips)

    def _read_tokens(self, add_space_prefix: bool) -> Vocabulary:
        """Tokens and types by id. Ids that nothing uses become tokens of type UNUSED."""
        model = self.spec["model"]
        vocab = model["vocab"]
        known = vocab if isinstance(vocab, dict) else {piece: id for id, (piece, _) in enumerate(vocab)}
        for id in known.values():
            validate_id(id, len(known))
        tokens = [f"[PAD{id}]" for id in range(max(known.values(), default=-1) + 1)]
        types = [int(TokenType.UNUSED)] * len(tokens)
        for token, id in known.items():
            is_byte = not self.is_byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token)
            tokens[id], types[id] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
        unknown = known.get(model.get("unk_token")) if isinstance(vocab, dict) else model.get("unk_id")
        if unknown is not None and not self.is_byte_level:
            types[unknown] = int(TokenType.UNKNOWN)
        kind = "bpe" if self.is_byte_level else "spm"
        steps = _steps(self.spec.get("pre_tokenizer"), "pretokenizers")
        prefix = next((step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"), None)
        base = Vocabulary(kind, tokens, types, add_space_prefix=add_space_prefix, prefix=prefix)
        added = self.spec.get("added_tokens") or []
        return base.with_added(AddedToken.from_json(token, token["id"]) for token in added)

    def library(
        self, vocabulary: Vocabulary, special: dict[str, int], names: Names
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that encodes text as the file says and knows special tokens by `names` alone.

        By their own names they (and the unknown one) are not in its vocabulary, merges and added tokens. It has no BOS,
        EOS, truncation or padding of its own. Also gives our id for each of its ids that is another.
        """
        from tokenizers import Tokenizer, models

        words = {token: id for token, id in vocabulary.of_type(TokenType.USER_DEFINED).items() if token not in special}
        hidden = special | vocabulary.of_type(TokenType.UNKNOWN)
        model = self.spec["model"]
        # The pipeline is the library's to parse; the model would take twice as long by way of JSON.
        steps = {name: self.spec.get(name) for name in ("normalizer", "pre_tokenizer")}
        empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
        tokenizer = Tokenizer.from_str(json.dumps(empty | steps))
        if isinstance(model["vocab"], dict):
            # A token that is added takes its id from the model's vocabulary, if it is there.
            vocab = {**model["vocab"], **words, **{name: id for id, name in names.by_id.items()}}
            for token in special:
                vocab.pop(token, None)
            options = {name: model[name] for name in BPE_OPTIONS if model.get(name) is not None}
            if self.is_byte_level:
                options.pop("unk_token", None)  # GPT-2's is also its end of text
            tokenizer.model = _bpe(vocab, _pairs(model["merges"]), hidden, options)
        else:  # Unigram: an id is a place in a list, so what nobody may type stays under another name
            shown = {id: secrets.token_hex(16) for id in hidden.values()} | names.by_id
            rows = [(shown.get(id, piece), score) for id, (piece, score) in enumerate(model["vocab"])]
            tokenizer.model = models.Unigram(rows, model.get("unk_id"), bool(model.get("byte_fallback")))
        return tokenizer, names.add_to(tokenizer, words, vocabulary.matching)

    def first_token(self) -> str | None:
        """The token that the file's own post-processor puts in front of a text, if any."""
        for step in _steps(self.spec.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
                return step["single"][0]["SpecialToken"]["id"]
        return None

    def full(self, vocabulary: Vocabulary) -> Vocabulary:
        """`vocabulary` with what GGUF needs to tokenize alike. Raises TokenizerError where it could not."""
        if vocabulary.merges:
            return vocabulary
        normalizers = {step["type"] for step in _steps(self.spec.get("normalizer"), "normalizers")}
        splitters = {step["type"] for step in _steps(self.spec.get("pre_tokenizer"), "pretokenizers")}
        known = normalizers <= {"NFC"} if self.is_byte_level else (normalizers | splitters) <= PIECE_ENCODERS
        if self.spec["model"].get("merges") is None or not known:
            raise TokenizerError(
                "GGUF cannot say how it tokenizes: it is not BPE, or it changes text in some other way"
            )
        pairs = _pairs(self.spec["model"]["merges"])
        if self.is_byte_level:
            return replace(vocabulary, merges=[" ".join(pair) for pair in pairs], pre=self._find_pre())
        order: dict[str, int] = {}  # a piece is as good as the first merge that makes it
        for pair in pairs:
            order.setdefault("".join(pair), len(order))
        scores = [-float(order.get(token, len(order))) for token in vocabulary.tokens]
        return replace(vocabulary, scores=scores)

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


BPE_OPTIONS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip


def _steps(node: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """The steps of one part of a tokenizer.json, with its Sequences laid flat."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for child in node[children] for step in _steps(child, children)]


def _llama_steps(prefix: str) -> dict[str, Any]:
    """The steps of transformers' own class for Llama, which it runs instead of the file's."""
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix != "never" else []
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": False}
    return {"normalizer": None, "pre_tokenizer": metaspace, "decoder": _piece_decoder(*strip)}


def _piece_decoder(*last: dict[str, Any]) -> dict[str, Any]:
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *last]}


def _is_piece_step(step: dict[str, Any]) -> bool:
    """Whether a step of a decoder is one that turns sentencepiece's pieces into text."""
    if step["type"] == "Replace":
        return step["pattern"] == {"String": "▁"} and step["content"] == " "
    return step["type"] in ("ByteFallback", "Fuse", "Strip", "Metaspace")


def _pairs(merges: Iterable[str | list[str]]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have "left right"."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


def _bpe(
    vocab: dict[str, int], pairs: list[tuple[str, str]], hidden: Mapping[str, int], options: dict[str, Any]
) -> models.BPE:
    """The library's model without the merges that take or make a hidden token."""
    from tokenizers import models

    if hidden.keys().isdisjoint(vocab):
        # Then the library refuses such merges. Few files have any, and to look for them in all takes a large
        # vocabulary a tenth of its time.
        with suppress(Exception):
            return models.BPE(vocab, pairs, **options)
    others = [
        (left, right) for left, right in pairs if not (left in hidden or right in hidden or left + right in hidden)
    ]
    return models.BPE(vocab, others, **options)


# --- a vocabulary from elsewhere as a tokenizer.json ----------------------------------------------------------------


def byte_level_json(vocabulary: Vocabulary, rule: PreTokenizer) -> TokenizerJson:
    """A byte-level vocabulary, as from a GGUF file, as a tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [*(split | {"pattern": {"Regex": pattern}} for pattern in rule.patterns), byte_level]
    spec = {
        "version": "1.0",
        "added_tokens": _added_tokens(vocabulary, TokenType.CONTROL, TokenType.USER_DEFINED),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary.of_type(TokenType.NORMAL),
            "merges": vocabulary.merges,
            "ignore_merges": rule.ignore_merges,
        },
    }
    return TokenizerJson(spec, vocabulary)


def write_spec(vocabulary: Vocabulary, bos_id: int | None) -> dict[str, Any]:
    """A tokenizer.json that tokenizes like `vocabulary`, and puts BOS in front where `bos_id` is one.

    Sentencepiece's normalization cannot be said: `vocabulary` must have none.
    """
    spec = _pieces_spec(vocabulary) if vocabulary.kind == "spm" else _byte_level_spec(vocabulary)
    if bos_id is not None:
        spec["post_processor"] = _bos_in_front(vocabulary.tokens[bos_id], bos_id)
    return spec


def _byte_level_spec(vocabulary: Vocabulary) -> dict[str, Any]:
    """A byte-level vocabulary as a tokenizer.json with every token, also the control ones, under its own id."""
    spec = byte_level_json(vocabulary, PRE_TOKENIZERS[vocabulary.pre]).spec
    model = spec["model"] | {"vocab": {token: id for id, token in enumerate(vocabulary.tokens)}}
    return {"truncation": None, "padding": None, "normalizer": None} | spec | {"model": model}


def _pieces_spec(vocabulary: Vocabulary) -> dict[str, Any]:
    """A sentencepiece vocabulary as a tokenizer.json: byte-fallback BPE, as transformers writes Llama's."""
    prepend = [{"type": "Prepend", "prepend": "▁"}] if vocabulary.add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.add_space_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
        "pre_tokenizer": None,
        "decoder": _piece_decoder(*strip),
    }
    if vocabulary.prefix is not None:
        steps = _llama_steps(vocabulary.prefix)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary, TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED),
        **steps,
        "post_processor": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(iter(vocabulary.of_type(TokenType.UNKNOWN)), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(vocabulary.tokens)},
            "merges": [list(pair) for pair in merges(vocabulary)],
        },
    }


def _added_tokens(vocabulary: Vocabulary, *types: TokenType) -> list[dict[str, Any]]:
    return [
        {
            **{"id": id, "content": token, "special": vocabulary.types[id] != TokenType.USER_DEFINED},
            **vocabulary.matching.get(id, Matching())._asdict(),
        }
        for token, id in vocabulary.of_type(*types).items()
    ]


def _bos_in_front(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts BOS in front of a text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": type}} for name, type in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, pair],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
