"""Text to token ids and back, for every kind of vocabulary that Llama models come with.

`Tokenizer` opens a sentencepiece model, Llama 3's tiktoken file, a Hugging Face `tokenizer.json` or the vocabulary
inside a GGUF file (`llama.vocabulary` has the table of them); a file's content, never its name, says which it is. Three
rules hold for all kinds:

- Text never becomes a control token. What a user types as `</s>` or `<|eot_id|>` is encoded as ordinary text. An added
  token controls where a file marks it as special, or where the model's chat template writes it (`<tool_call>`); any
  other is a word, and found in text.
- Control tokens have no text: `decode` leaves them out, as sentencepiece does. Those that no file marks as special are
  shown.
- `decode` is what a `StreamDecoder` shows, so that streamed text is decoded text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files.gguf import GGUFFile
from .vocabulary import KINDS, TURN_ENDS, TokenizerError, Vocabulary, gguf, naming, open_vocabulary

__all__ = ["KINDS", "StreamDecoder", "Tokenizer", "TokenizerError", "Vocabulary"]


class Tokenizer:
    """Text to token ids and back. Once made it does not change, and several threads may use it.

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

    def __init__(self, model_path: str | os.PathLike[str] | GGUFFile, chat_template: str | None = None) -> None:
        """Open a vocabulary, in a GGUF file that is open already or at a path.

        `chat_template`: the Jinja template to use instead of the model's own; it says what is markup, too.

        Raises FileNotFoundError, or TokenizerError (a ValueError) for what is not one.
        """
        source = model_path if isinstance(model_path, GGUFFile) else Path(model_path)
        self._path = source.path if isinstance(source, GGUFFile) else source
        if not self._path.exists():
            raise FileNotFoundError(
                f"no tokenizer at {self._path}: give a tokenizer.model, tokenizer.json or .gguf file"
            )
        if self._path.is_dir():
            raise TokenizerError(
                f"{self._path} is a directory: give the tokenizer.model, tokenizer.json or .gguf file in it"
            )
        with naming(self._path):
            self.kind, self.codec, controls = open_vocabulary(source, chat_template)
            self.n_words: int = self.codec.n_words
            self.sp_model = self.codec.sp_model
            self.special_tokens: dict[str, int] = self.codec.special_tokens
            self.bos_id, self.eos_id, self.pad_id = controls.bos_id, controls.eos_id, controls.pad_id
            self.add_bos: bool = controls.add_bos and controls.bos_id >= 0
            self.chat_template: str | None = controls.chat_template
            named = (self.special_tokens.get(name, -1) for name in TURN_ENDS)
            ends = {controls.eos_id, *controls.ends, *named}
            self.stop_ids: frozenset[int] = frozenset(id for id in ends if 0 <= id < self.n_words)
        self._controls = replace(controls, add_bos=self.add_bos)
        self._special_ids = frozenset(self.special_tokens.values())

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
        return [self.bos_id] * bool(bos) + self.encode_pieces([s]) + [self.eos_id] * bool(eos)

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        """The ids of a prompt that is made of ordinary text and, by their ids, control tokens.

        Text is encoded as it would be in the prompt's string: whether it gets a space in front, and whether a control
        token takes the white space beside it along, is as the vocabulary says. Texts that touch are encoded as one.
        """
        runs: list[str | int] = []
        for piece in pieces:
            if isinstance(piece, int) or not (runs and isinstance(runs[-1], str)):
                runs.append(piece)
            else:
                runs[-1] += piece
        placed = [piece for piece in runs if isinstance(piece, int)]
        if not self._special_ids.issuperset(placed):
            raise ValueError("only control tokens are placed by their ids")
        tokens = self.codec.encode([run if isinstance(run, int) else _characters(run) for run in runs])
        assert [id for id in tokens if id in self._special_ids] == placed, "text became a control token"
        return tokens

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
        with naming(self._path):
            return self.codec.vocabulary()

    def gguf_metadata(self) -> dict[str, Any]:
        """The `tokenizer.*` metadata of a GGUF file with this vocabulary: what `vocabulary` says, and the controls.

        Values are strings, bools, ids (to be written as uint32), or lists of one type (as int32, float32, string).
        """
        return gguf.metadata(self.vocabulary(), self._controls)


class StreamDecoder:
    """Token ids to text, one at a time, never half a character.

    What `push` and the last `flush` return joins to exactly `tokenizer.decode(all ids)`, whatever the ids. Bytes that
    may become a character are held back until the ids show whether they do. Each id costs the same, however many came
    before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.codec.stream()
        self._n_words = tokenizer.n_words

    def push(self, id: int) -> str:
        """The text that `id` makes certain; often "". Raises ValueError for an id outside the vocabulary."""
        _check_id(id, self._n_words)
        return self._stream.push(id)

    def flush(self) -> str:
        """The text that was held back: U+FFFD for the bytes of a character that was never finished."""
        return self._stream.flush()


def _characters(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which is no character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_id(id: int, n_words: int) -> None:
    if not 0 <= id < n_words:
        raise ValueError(f"token id {id} is outside the vocabulary, whose ids are 0 to {n_words - 1}")
