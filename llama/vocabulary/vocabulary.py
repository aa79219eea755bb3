"""What a vocabulary is, whatever file keeps it, and what each kind of file must give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from .added import MARKUP, AddedToken, Cutter, Matching, Piece, written_by

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_TOKENS = 1 << 22
MAX_UNUSED = 1 << 16  # ids between tokens that nothing uses: real vocabularies leave hundreds


class TokenizerError(ValueError):
    """A file that holds no vocabulary, or one that is damaged or of an unknown kind."""


def validate_id(id: object, num_tokens: int) -> None:
    """Raises TokenizerError for a token's id that cannot be, or is far beyond so many tokens."""
    most = min(num_tokens + MAX_UNUSED, MAX_TOKENS) - 1
    if type(id) is not int or not 0 <= id <= most:
        raise TokenizerError(f"a token's id is not a number from 0 to {most}, for a vocabulary of {num_tokens}")


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
    types: Sequence[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    add_space_prefix: bool = False
    prefix: str | None = None  # before which texts transformers puts that space: "always", "first", "never"
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""  # sentencepiece's compiled normalisation; empty in Meta's files
    matching: Mapping[int, Matching] = field(default_factory=dict)  # of added tokens that are found in a special way

    def of_type(self, *types: TokenType) -> dict[str, int]:
        """Tokens of these types and their ids, by id."""
        ids = sorted(id for type in types for id in self._ids_by_type.get(type, ()))
        return dict(zip(map(self.tokens.__getitem__, ids), ids, strict=True))

    @cached_property
    def _ids_by_type(self) -> dict[int, list[int]]:
        ids: dict[int, list[int]] = {}
        for id, type in enumerate(self.types):
            ids.setdefault(type, []).append(id)
        return ids

    def special_tokens(self, chat_template: str | None = None) -> dict[str, int]:
        """Every token that text must not become: control tokens, and added ones that mark up dialogs.

        An added token that is not special is markup where the template writes it or the chat formats here do; any other
        is a word like those of the vocabulary, which text becomes.
        """
        written = written_by(chat_template or "")
        markup = {
            token: id
            for token, id in self.of_type(TokenType.USER_DEFINED).items()
            if token in MARKUP or (token in written and not token.replace("▁", "").isspace() and token.strip("▁"))
        }
        return self.of_type(TokenType.CONTROL) | markup

    def with_added(self, added: Iterable[AddedToken]) -> Vocabulary:
        """The vocabulary with these tokens in it. One that has the id of another takes its place."""
        tokens, types, scores = [*self.tokens], [*self.types], [*self.scores]
        matching = dict(self.matching)
        ids = {token: id for id, token in enumerate(tokens)}
        for token in added:
            id = ids.get(token.content, len(tokens) if token.id is None else token.id)
            validate_id(id, len(ids))
            for free in range(len(tokens), id + 1):
                tokens.append(f"[PAD{free}]")
                types.append(int(TokenType.UNUSED))
                scores += [0.0] * bool(scores)
            tokens[id], ids[token.content] = token.content, id
            if types[id] != TokenType.UNKNOWN:
                types[id] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
            matching[id] = token.matching or matching.get(id, Matching())
        return replace(self, tokens=tokens, types=types, scores=scores, matching=matching)


@dataclass(frozen=True)
class Controls:
    """What a file says about the use of its tokens. An id of -1: there is no such token."""

    bos_id: int = -1
    eos_id: int = -1
    pad_id: int = -1
    add_bos: bool = False
    ends: tuple[int, ...] = ()  # further ids that end a turn
    chat_template: str | None = None


class Stream(Protocol):
    """Ids to text, one at a time, never half a character."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class Codec(Protocol):
    """One way to tokenize. Ids run from 0 to n_words - 1; `special_tokens` are those that text never becomes.

    `tokens` has every token, with its type and how it is found, but not always what else a vocabulary has.
    """

    n_words: int
    tokens: Vocabulary
    special_tokens: dict[str, int]
    sp_model: SentencePieceProcessor | None

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """The ids of ordinary text, with the control tokens that are placed in it; no two texts touch."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; b"" for control tokens."""
        ...

    def stream(self) -> Stream:
        """A decoder at the beginning of a text."""
        ...

    def vocabulary(self) -> Vocabulary:
        """All that another file needs to tokenize alike. Raises TokenizerError where GGUF has no means to say it."""
        ...


def needed_cutter(vocabulary: Vocabulary, special_tokens: Mapping[str, int]) -> Cutter | None:
    """What cuts text at the tokens that were added from outside; None where none act on text."""
    added = vocabulary.of_type(TokenType.USER_DEFINED)
    words = {token: id for token, id in added.items() if id in vocabulary.matching and token not in special_tokens}
    acts = any(any(vocabulary.matching.get(id, ())) for id in special_tokens.values())
    return Cutter(special_tokens, words, vocabulary.matching) if words or acts else None
