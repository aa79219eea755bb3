"""Vocabularies of sentencepiece's pieces, in whatever file: "▁" is a space, and characters may be spelled in bytes."""

from __future__ import annotations

from collections.abc import Iterator

from .vocabulary import TokenType, Vocabulary


class PieceStream:
    """Ids to text: "▁" for a space, and whole characters except in runs of byte tokens.

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


def piece_bytes(piece: str, type: int) -> bytes:
    """The bytes that a piece shows, its leading space included; b"" for control tokens and the unknown one."""
    if type in (TokenType.CONTROL, TokenType.UNKNOWN):
        return b""
    return bytes([int(piece[3:5], 16)]) if type == TokenType.BYTE else piece.replace("▁", " ").encode()


def merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best score first: how sentencepiece joins, as a list of merges."""
    usable = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED}
    rows = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    scores = {token: score for token, score, type in rows if type in usable}
    pairs = (
        (-score, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    )
    return ((left, right) for _, left, right in sorted(pairs))
