"""The vocabulary inside a GGUF file: its `tokenizer.*` metadata, read and written.

Names and defaults: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.gguf import BOOL, FLOAT32, INT8, INT32, STRING, UINT8, UINT32, GGUFFile, LazyArray, Value
from .byte_level import PRE_TOKENIZERS
from .sentencepiece import SentencePiece, write_proto
from .tokenizer_json import Tokenizers, byte_level_json
from .vocabulary import Codec, Controls, TokenizerError, TokenType, Vocabulary

MODELS = {"spm": "llama", "bpe": "gpt2"}
"""What `tokenizer.ggml.model` says of a vocabulary, by its kind here."""


def from_gguf(source: Path | GGUFFile, chat_template: str | None = None) -> tuple[Codec, Controls]:
    """The vocabulary of a file, opened already or not."""
    file = source if isinstance(source, GGUFFile) else GGUFFile(source)
    vocabulary = read_vocabulary(file)
    ids = {name: token_id(file, name) for name in ("unknown", "bos", "eos", "padding", "eot", "eom")}
    template = chat_template or file.metadata.get("tokenizer.chat_template")
    make = _pieces if vocabulary.kind == "spm" else _byte_level
    codec, add_bos = make(vocabulary, ids, template)
    return codec, Controls(
        *(ids["bos"], ids["eos"], ids["padding"]),
        add_bos=bool(file.metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        ends=(ids["eot"], ids["eom"]),
        chat_template=template,
    )


def _pieces(vocabulary: Vocabulary, ids: dict[str, int], template: str | None) -> tuple[Codec, bool]:
    """The codec, and whether BOS goes in front in a file that does not say."""
    unknown = next(iter(vocabulary.of_type(TokenType.UNKNOWN).values()))
    roles = {"unk": unknown, "bos": ids["bos"], "eos": ids["eos"], "pad": ids["padding"]}
    return SentencePiece(write_proto(vocabulary, roles), vocabulary, template), True


def _byte_level(vocabulary: Vocabulary, ids: dict[str, int], template: str | None) -> tuple[Codec, bool]:
    """The codec, and whether BOS goes in front in a file that does not say."""
    rule = PRE_TOKENIZERS.get(vocabulary.pre)
    if rule is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise TokenizerError(f"the pre-tokenizer {vocabulary.pre!r} is not known; known are {known}")
    return Tokenizers(byte_level_json(vocabulary, rule), vocabulary, template, rule.cut_long_runs), rule.add_bos


# --- reading ------------------------------------------------------------------------------------------------------


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """What `metadata` writes and what llama.cpp's converters write. Raises TokenizerError."""
    model = file.metadata.get("tokenizer.ggml.model")
    if model not in MODELS.values():
        raise TokenizerError(f'tokenizer.ggml.model is {model!r}; "llama" and "gpt2" are known')
    is_spm = model == MODELS["spm"]
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(_array(file, "tokens", STRING))]
    types = _array(file, "token_type", INT32, UINT32) or [int(TokenType.NORMAL)] * len(tokens)
    scores = _array(file, "scores", FLOAT32) or [0.0] * len(tokens)
    if not len(tokens) == len(types) == len(scores):
        raise TokenizerError("the lists of tokens, types and scores differ in length")
    return Vocabulary(
        kind="spm" if is_spm else "bpe",
        tokens=tokens,
        types=_mended_types(types, file, is_spm),
        scores=scores,
        merges=_array(file, "merges", STRING),
        pre=file.metadata.get("tokenizer.ggml.pre", "default"),
        add_space_prefix=file.metadata.get("tokenizer.ggml.add_space_prefix", is_spm),
        remove_extra_whitespaces=file.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        charsmap=bytes(value & 0xFF for value in _array(file, "precompiled_charsmap", UINT8, INT8, INT32)),
    )


def token_id(file: GGUFFile, name: str) -> int:
    """The id of the "bos", "eos", "eot", "eom", "padding" or "unknown" token, -1 for none.

    As in llama.cpp, an id outside the vocabulary is none, and a sentencepiece vocabulary has three by default.
    """
    is_spm = file.metadata["tokenizer.ggml.model"] == MODELS["spm"]
    default = {"unknown": 0, "bos": 1, "eos": 2}.get(name, -1) if is_spm else -1
    id = file.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    return id if isinstance(id, int) and 0 <= id < file.length("tokenizer.ggml.tokens") else -1


def _array(file: GGUFFile, name: str, *kinds: int) -> list[Any]:
    """The values of an array of one of these types; none where there is no such array. Raises TokenizerError."""
    array = file.metadata.get(f"tokenizer.ggml.{name}")
    if array is None:
        return []
    if not isinstance(array, LazyArray) or array.kind not in kinds:
        raise TokenizerError(f"the lists hold values of a wrong type: tokenizer.ggml.{name}")
    return array.read()


def _mended_types(types: list[int], file: GGUFFile, is_spm: bool) -> list[int]:
    """Files leave control tokens typed as NORMAL, and several as UNKNOWN where sentencepiece wants exactly one."""
    for name in ("bos", "eos", "eot", "eom"):
        id = token_id(file, name)
        if id >= 0 and types[id] == TokenType.NORMAL:
            types[id] = int(TokenType.CONTROL)
    if is_spm:
        unknown, *others = [id for id, type in enumerate(types) if type == TokenType.UNKNOWN] or [
            token_id(file, "unknown")
        ]
        types[unknown] = int(TokenType.UNKNOWN)
        for id in others:
            types[id] = int(TokenType.UNUSED)
    return types


# --- writing ------------------------------------------------------------------------------------------------------


def metadata(vocabulary: Vocabulary, controls: Controls) -> dict[str, Any]:
    """The `tokenizer.*` metadata that keeps these: key -> string, bool, id, or list of one type."""
    ids = {"bos": controls.bos_id, "eos": controls.eos_id, "padding": controls.pad_id}
    fields = {
        "tokenizer.ggml.model": MODELS[vocabulary.kind],
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": [int(type) for type in vocabulary.types],
        "tokenizer.ggml.scores": vocabulary.scores,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": vocabulary.remove_extra_whitespaces,
        "tokenizer.ggml.precompiled_charsmap": list(vocabulary.charsmap),
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id >= 0},
        "tokenizer.ggml.add_bos_token": controls.add_bos,
        "tokenizer.chat_template": controls.chat_template,
    }
    return {key: value for key, value in fields.items() if value is not None and value != []}


def as_value(key: str, value: Any) -> Value:
    """A metadata value in the GGUF type that llama.cpp expects for it."""
    if not isinstance(value, list):
        return Value({str: STRING, bool: BOOL, int: UINT32, float: FLOAT32}[type(value)], value)
    if key.endswith("charsmap"):
        return Value(UINT8, value)
    return Value({str: STRING, float: FLOAT32}.get(type(value[0]), INT32), value)
