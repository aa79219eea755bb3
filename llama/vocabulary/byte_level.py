"""Byte-level vocabularies: their alphabet, how each model family cuts words, and ids to text."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import NamedTuple


def _printable_bytes() -> list[str]:
    """GPT-2's alphabet: the character that stands for each byte (printable Latin-1, then U+0100 and on)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


CHAR_OF_BYTE: list[str] = _printable_bytes()
BYTE_OF_CHAR: dict[str, int] = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}


class ByteStream:
    """Ids to text: tokens are slices of one UTF-8 text, and may cut a character anywhere."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(self._token_bytes(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


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
