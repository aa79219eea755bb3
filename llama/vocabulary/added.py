"""Tokens that were added to a vocabulary, and how text is cut at them: as transformers does, with its library."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers

Piece = str | int
"""Ordinary text, or a control token that is placed there, by its id."""


class Matching(NamedTuple):
    """How an added token is found: as a whole word only, with the white space around it, in normalized text."""

    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class AddedToken:
    """A token that a file adds. Without an id it gets the next free one, if the vocabulary does not have it.

    `matching` is None where the file does not say; then it stays as another file said.
    """

    content: str
    id: int | None
    special: bool
    matching: Matching | None = None

    @staticmethod
    def from_json(token: Mapping[str, Any], id: int | None, special: bool = False) -> AddedToken:
        """One as Hugging Face's files write it."""
        flags = Matching(*(bool(token.get(name, False)) for name in Matching._fields))
        return AddedToken(token["content"], id, bool(token.get("special")) or special, flags)


class Names:
    """Names for control tokens that nobody can type: random ones.

    Under these names they go through a library's pipeline in the midst of text, and act on the text beside them as they
    do in transformers, while what a person types in their likeness is text.
    """

    def __init__(self, control: Mapping[str, int]) -> None:
        secret = secrets.token_hex(16)
        self.by_id = {id: f"\uf8ff{secret}{id}\uf8ff" for id in control.values()}

    def join(self, pieces: Sequence[Piece]) -> str:
        """Pieces as one text, every control token under its name."""
        return "".join(piece if isinstance(piece, str) else self.by_id[piece] for piece in pieces)

    def add_to(
        self, library: tokenizers.Tokenizer, words: Mapping[str, int], matching: Mapping[int, Matching]
    ) -> dict[int, int]:
        """Adds the control tokens and these words to a library's tokenizer. Gives our id of each of its new ids."""
        from tokenizers import AddedToken as Added

        tokens = sorted([*((id, name) for id, name in self.by_id.items()), *((id, w) for w, id in words.items())])
        flags = [matching.get(id, Matching())._asdict() for id, _ in tokens]
        library.add_tokens([Added(name, **flag) for (_, name), flag in zip(tokens, flags, strict=True)])
        ids = {library.token_to_id(name): id for id, name in tokens}
        return {found: id for found, id in ids.items() if found is not None and found != id}


class Cutter:
    """Cuts text at added words and at control tokens, for vocabularies whose own library knows of neither."""

    def __init__(self, control: Mapping[str, int], words: Mapping[str, int], matching: Mapping[int, Matching]) -> None:
        from tokenizers import Tokenizer, models

        self._names = Names(control)
        self._library = Tokenizer(models.BPE())  # of no vocabulary: all it finds is what was added
        self._ids = self._names.add_to(self._library, words, matching)

    def cut(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces, with every added word as its id and without the white space that tokens take along.

        An empty text comes first where a control token or a word does: only the first piece begins the whole text.
        """
        text = self._names.join(pieces)
        found = self._library.encode(text, add_special_tokens=False)
        at = 0
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if start > at or at == 0:
                yield text[at:start]
            yield self._ids.get(id, id)
            at = end
        yield text[at:]


# --- which added tokens are markup --------------------------------------------------------------------------------

MARKUP = frozenset(
    (
        "<s>", "</s>", "<bos>", "<eos>", "<|begin_of_text|>", "<|end_of_text|>", "<|startoftext|>", "<|endoftext|>",
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        "<|eom_id|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "<|end_of_turn|>",
        "▁<EOT>",
    )
)  # fmt: skip
"""What the chat formats here and those of published models are made of."""

_CODE = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
_LITERAL = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
_LOOKS_UP = re.compile(r"(\[|[=!]=|\bin|\bget\()\s*$")  # what stands before a literal that is compared, or is a key


def written_by(template: str) -> str:
    """What a Jinja template writes of its own: its text, and the literals that are no keys and are not compared."""
    parts = [_CODE.sub("\n", template)]
    for code in _CODE.findall(template):
        for literal in () if code.startswith("{#") else _LITERAL.finditer(code):
            if not _LOOKS_UP.search(code[: literal.start()]):
                parts.append(literal[1] or literal[2] or "")
    return "\n".join(parts)
