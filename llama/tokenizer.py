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
import json
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
    TokenizerError,
    TokenizerJson,
    TokenType,
    Vocabulary,
    gguf_token_id,
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


def _check_id(id: int, n_words: int) -> None:
    if not 0 <= id < n_words:
        raise ValueError(f"token id {id} is outside the vocabulary, whose ids are 0 to {n_words - 1}")


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
        _check_id(id, self._n_words)
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
        self._unknown = self.sp_model.decode([self.sp_model.unk_id()])
        self.n_words = len(self._vocabulary.tokens)
        self.special_tokens = self._vocabulary.special_tokens()
        added = {id for id in self.special_tokens.values() if self._vocabulary.types[id] != TokenType.CONTROL}
        self._encoder = (
            SentencePieceProcessor(model_proto=with_control_pieces(proto, added)) if added else self.sp_model
        )

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
        return _PieceStream(self._vocabulary, unknown=self._unknown)

    def vocabulary(self) -> Vocabulary:
        if not self._is_bpe:
            raise TokenizerError(
                "this sentencepiece model is not BPE: a GGUF vocabulary cannot tokenize like it"
            )
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
            *(
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|reserved_special_token_0|>",
                "<|reserved_special_token_1|>",
            ),
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
        self._model = tokenizers.Tokenizer.from_str(json.dumps(source.plain()))

    def encode(self, text: str) -> list[int]:
        return [
            id for part in self._cut(text) for id in self._model.encode(part, add_special_tokens=False).ids
        ]

    def token_bytes(self, id: int) -> bytes:
        token, type = self._tokens[id], self._types[id]
        if type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED):
            return b""
        if not self._source.is_byte_level:
            return (
                bytes([int(token[3:5], 16)]) if type == TokenType.BYTE else token.replace("▁", " ").encode()
            )
        if type == TokenType.USER_DEFINED:
            return token.encode()
        try:
            return bytes(BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # a token that is not written in the alphabet of bytes is text as it is
            return token.encode()

    def text(self) -> _ByteStream | _PieceStream:
        if self._source.is_byte_level:
            return _ByteStream(self.token_bytes)
        return _PieceStream(self._source.vocabulary, unknown="")

    def vocabulary(self) -> Vocabulary:
        return self._source.full_vocabulary()


# --- the kinds of files -----------------------------------------------------------------------------------------

# How published vocabularies name the token that begins a text, and those that end a turn.
_STARTS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<｜begin▁of▁sentence｜>")
_TURN_ENDS = (
    *("</s>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<eos>"),
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "▁<EOT>"),
)


@dataclass(frozen=True)
class _Controls:
    """What a file says about the use of its tokens. An id of -1: there is no such token."""

    bos_id: int = -1
    eos_id: int = -1
    pad_id: int = -1
    add_bos: bool = False
    ends: tuple[int, ...] = ()  # further ids that end a turn
    chat_template: str | None = None


def _with_config(controls: _Controls, folder: Path, codec: Codec) -> _Controls:
    """`controls`, overruled by the Hugging Face files that lie beside the vocabulary, if there are any."""
    config: dict[str, Any] = {}  # of two files that say something, the later one counts
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    changes: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in codec.special_tokens:
            changes[f"{name}_id"] = codec.special_tokens[token]
    ends = config.get("eos_token_id", [])
    changes["ends"] = tuple(ends if isinstance(ends, list) else [ends])
    if isinstance(config.get("add_bos_token"), bool):
        changes["add_bos"] = config["add_bos_token"]
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return replace(controls, **changes, chat_template=template)


def _open_sentencepiece(path: Path) -> tuple[Codec, _Controls]:
    codec = _SentencePiece(path.read_bytes())
    model = codec.sp_model
    controls = _Controls(model.bos_id(), model.eos_id(), model.pad_id(), add_bos=True)
    return codec, _with_config(controls, path.parent, codec)


def _open_tiktoken(path: Path) -> tuple[Codec, _Controls]:
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    has_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if list(ranks.values()) != list(range(len(ranks))) or not has_bytes:
        raise TokenizerError("the ranks are not 0, 1, 2, ... once each, or a single byte has none")
    codec = _Tiktoken(ranks)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
    controls = _Controls(*(codec.special_tokens[name] for name in names), add_bos=True)
    return codec, _with_config(controls, path.parent, codec)


def _open_tokenizer_json(path: Path) -> tuple[Codec, _Controls]:
    spec = read_json(path)
    if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise TokenizerError("JSON, but no tokenizer.json: it has no model with a vocabulary")
    source = TokenizerJson(spec)
    codec = _Tokenizers(source)
    first = source.first_token()
    bos_id = _first_known((first, *_STARTS), codec)
    controls = _Controls(bos_id, _first_known(_TURN_ENDS, codec), add_bos=first is not None)
    return codec, _with_config(controls, path.parent, codec)


def _first_known(names: Iterable[str | None], codec: Codec) -> int:
    return next((codec.special_tokens[name] for name in names if name in codec.special_tokens), -1)


def _open_gguf(path: Path) -> tuple[Codec, _Controls]:
    fields = read_gguf_metadata(path)
    vocabulary = Vocabulary.from_gguf(fields)
    names = ("unknown", "bos", "eos", "padding", "eot", "eom")
    ids = {name: gguf_token_id(fields, name) for name in names}
    codec, add_bos = _spm_codec(vocabulary, ids) if vocabulary.kind == "spm" else _bpe_codec(vocabulary)
    return codec, _Controls(
        *(ids["bos"], ids["eos"], ids["padding"]),
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", add_bos)),
        ends=(ids["eot"], ids["eom"]),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _spm_codec(vocabulary: Vocabulary, ids: dict[str, int]) -> tuple[Codec, bool]:
    """The codec, and whether BOS goes in front in a file that does not say."""
    unknown = vocabulary.types.index(TokenType.UNKNOWN)
    roles = {"unk": unknown, "bos": ids["bos"], "eos": ids["eos"], "pad": ids["padding"]}
    return _SentencePiece(proto_from_vocabulary(vocabulary, roles)), True


def _bpe_codec(vocabulary: Vocabulary) -> tuple[Codec, bool]:
    """The codec, and whether BOS goes in front in a file that does not say."""
    rule = PRE_TOKENIZERS.get(vocabulary.pre)
    if rule is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise TokenizerError(f"the pre-tokenizer {vocabulary.pre!r} is not known; known are {known}")
    return _Tokenizers(TokenizerJson.from_vocabulary(vocabulary, rule), rule.cut_long_runs), rule.add_bos


@dataclass(frozen=True)
class Kind:
    """A kind of file: whether one begins like it (`matches` sees its first 256 bytes), and how it is opened."""

    matches: Callable[[bytes], Any]
    open: Callable[[Path], tuple[Codec, _Controls]]


KINDS: dict[str, Kind] = {
    "gguf": Kind(re.compile(rb"GGUF").match, _open_gguf),
    "tokenizer.json": Kind(re.compile(rb"\s*\{").match, _open_tokenizer_json),
    "tiktoken": Kind(re.compile(rb"[A-Za-z0-9+/]+=* \d+\s").match, _open_tiktoken),
    "sentencepiece": Kind(re.compile(rb"\n.\n", re.DOTALL).match, _open_sentencepiece),
}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes the readers and their libraries raise becomes one line with the file's name."""
    try:
        yield
    except OSError:
        raise
    except BaseException as error:
        # Rust's panics reach Python as a BaseException whose class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        if not isinstance(error, TokenizerError):
            reason = f"a damaged vocabulary ({type(error).__name__}: {reason[:200]})"
        raise TokenizerError(f"{path}: {reason}") from error


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        kind: the row of `KINDS` that the file is of.
        n_words: the size of the vocabulary; ids run from 0 to n_words - 1.
        bos_id, eos_id, pad_id: -1 where the vocabulary has no such token.
        add_bos: whether the vocabulary's own configuration puts BOS in front of a text (Meta's files: always).
        special_tokens: every control or added token that text never becomes, by its string.
        stop_ids: the tokens that end a turn or a text.
        chat_template: the model's own Jinja template, if it came with one.
        sp_model: the SentencePieceProcessor, for sentencepiece vocabularies.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        """Open a vocabulary. Raises FileNotFoundError, or TokenizerError (a ValueError) for what is not one."""
        self._path = Path(model_path)
        if not self._path.exists():
            raise FileNotFoundError(
                f"no tokenizer at {model_path}: give a tokenizer.model, tokenizer.json or .gguf file"
            )
        if self._path.is_dir():
            raise TokenizerError(
                f"{model_path} is a directory: give the tokenizer.model, tokenizer.json or .gguf file in it"
            )
        with _naming(self._path):
            self.kind, kind = self._find_kind()
            self.codec, controls = kind.open(self._path)
            self.n_words: int = self.codec.n_words
            self.sp_model = self.codec.sp_model
            self.special_tokens: dict[str, int] = self.codec.special_tokens
            self.bos_id, self.eos_id, self.pad_id = controls.bos_id, controls.eos_id, controls.pad_id
            self.add_bos: bool = controls.add_bos and controls.bos_id >= 0
            self.chat_template: str | None = controls.chat_template
            named = (self.special_tokens.get(name, -1) for name in _TURN_ENDS)
            ends = {controls.eos_id, *controls.ends, *named}
            self.stop_ids: frozenset[int] = frozenset(id for id in ends if 0 <= id < self.n_words)
        self._special_ids = frozenset(self.special_tokens.values())

    def _find_kind(self) -> tuple[str, Kind]:
        with self._path.open("rb") as file:
            head = file.read(256)
        for name, kind in KINDS.items():
            if kind.matches(head):
                return name, kind
        raise TokenizerError(
            f"no vocabulary of a known kind ({', '.join(KINDS)}): it begins with {head[:8]!r}"
        )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s` as ordinary text, with BOS in front and EOS behind where asked.

        Half of a surrogate pair, which is no character, counts as U+FFFD. Bytes that a byte-level vocabulary lacks
        (SmolLM2's: a few control characters) are left out. Raises ValueError if BOS or EOS is asked for and the
        vocabulary has none.
        """
        if not isinstance(s, str):
            raise TypeError(f"encode takes a str, not {type(s).__name__}")
        for name, asked, id in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if asked and id == -1:
                raise ValueError(f"{self._path} has no {name.upper()} token: encode with {name}=False")
        text = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens = self.codec.encode(text)
        assert self._special_ids.isdisjoint(tokens), "text became a control token"
        return [self.bos_id] * bool(bos) + tokens + [self.eos_id] * bool(eos)

    def decode(self, t: list[int] | int) -> str:
        """The text of ids (or of one id). Raises ValueError for an id outside the vocabulary."""
        stream = StreamDecoder(self)
        ids = [t] if isinstance(t, int) else t
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; b"" for control tokens. A sentencepiece piece keeps its leading space."""
        _check_id(id, self.n_words)
        return self.codec.token_bytes(id)

    def vocabulary(self) -> Vocabulary:
        """All that another file needs to tokenize alike. Raises TokenizerError where GGUF has no means to say it."""
        with _naming(self._path):
            return self.codec.vocabulary()

    def gguf_metadata(self) -> dict[str, Any]:
        """The `tokenizer.*` metadata of a GGUF file with this vocabulary: what `vocabulary` says, and the controls.

        Values are strings, bools, ids (to be written as uint32), or lists of one type (as int32, float32, string).
        """
        ids = {"bos": self.bos_id, "eos": self.eos_id, "padding": self.pad_id}
        controls: dict[str, Any] = {
            f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id >= 0
        }
        controls["tokenizer.ggml.add_bos_token"] = self.add_bos
        if self.chat_template is not None:
            controls["tokenizer.chat_template"] = self.chat_template
        return self.vocabulary().to_gguf() | controls
