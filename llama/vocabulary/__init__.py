"""Vocabularies: one file for each kind, which reads, runs and writes it. Files are not trusted.

A new kind is a module with a `from_...` that gives a `Codec` and `Controls`, and a row in KINDS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.errors import CheckpointError
from ..files.gguf import GGUFFile
from ..files.mapped import open_file
from .beside import TURN_ENDS
from .gguf import from_gguf
from .sentencepiece import from_sentencepiece
from .tiktoken import from_tiktoken
from .tokenizer_json import from_tokenizer_json
from .vocabulary import Codec, Controls, Stream, TokenizerError, TokenType, Vocabulary

__all__ = [
    "KINDS", "TURN_ENDS", "Codec", "Controls", "Kind", "Stream", "TokenType", "TokenizerError", "Vocabulary", "naming",
    "open_vocabulary",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file: whether one begins like it (`matches` sees its first 256 bytes), and how it is opened."""

    matches: Callable[[bytes], Any]
    open: Callable[[Path, str | None], tuple[Codec, Controls]]


KINDS: dict[str, Kind] = {
    "gguf": Kind(re.compile(rb"GGUF").match, from_gguf),
    "tokenizer.json": Kind(re.compile(rb"\s*\{").match, from_tokenizer_json),
    "tiktoken": Kind(re.compile(rb"[A-Za-z0-9+/]+=* \d+\s").match, from_tiktoken),
    "sentencepiece": Kind(re.compile(rb"\n.\n", re.DOTALL).match, from_sentencepiece),
}


def open_vocabulary(source: Path | GGUFFile, chat_template: str | None = None) -> tuple[str, Codec, Controls]:
    """The row of KINDS that a file is of, told by its content, and what it holds. Raises TokenizerError."""
    if isinstance(source, GGUFFile):
        return "gguf", *from_gguf(source, chat_template)
    with open_file(source) as file:
        head = file.read(256)
    for name, kind in KINDS.items():
        if kind.matches(head):
            return name, *kind.open(source, chat_template)
    raise TokenizerError(f"no vocabulary of a known kind ({', '.join(KINDS)}): it begins with {head[:8]!r}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
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
        if not isinstance(error, TokenizerError | CheckpointError):
            reason = f"a damaged vocabulary ({type(error).__name__}: {reason[:200]})"
        raise TokenizerError(f"{path}: {reason.removeprefix(f'{path}: ')}") from error
