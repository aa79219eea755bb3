"""A `Llama` that says what a test wants: a tiny random model whose logits are bent to a script, token by token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from llama import Llama
from llama.answer import Inbox, Query
from support.tiny import ByteStream, ByteTokenizer, tiny_args, tiny_model

WORD = re.compile(r"\s*(?:[!-~]{1,12}|[^\s!-~]{1,3})|\s+", re.ASCII)
SMALL = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=8192, max_batch_size=8)


class WordStream(ByteStream):
    words: list[str]

    def push(self, id: int) -> str:
        return super().push(id) if id < 256 else self._decoder.decode(self.words.get(id, b""))


class WordTokenizer(ByteTokenizer):
    """Bytes, three control tokens, and the words of some texts."""

    def __init__(self, texts: Sequence[str]):
        words = sorted({word for text in texts for word in WORD.findall(text)})
        self.words = {word: ByteTokenizer.n_words + i for i, word in enumerate(words)}
        self.bytes = {id: word.encode() for word, id in self.words.items()}
        self.n_words = ByteTokenizer.n_words + len(words)
        self.codec = type("WordCodec", (), {"stream": type("Stream", (WordStream,), {"words": self.bytes})})

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        ids = []
        at = 0
        for match in WORD.finditer(s):
            ids += s[at : match.start()].encode()
            id = self.words.get(match[0])
            ids += match[0].encode() if id is None else [id]
            at = match.end()
        return [self.bos_id] * bos + [*ids, *s[at:].encode()] + [self.eos_id] * eos

    def encode_pieces(self, pieces: Any) -> list[int]:
        return [id for p in pieces for id in ([p] if isinstance(p, int) else self.encode(p, bos=False, eos=False))]

    def token_bytes(self, id: int) -> bytes:
        return self.bytes.get(id, b"") if id >= ByteTokenizer.n_words else super().token_bytes(id)


def scripted_llm(texts: Sequence[str], says: Callable[[str], str], **changes: Any) -> Llama:
    """A model that answers a prompt's text with `says(text)`; words of `texts` are tokens."""
    tokenizer = WordTokenizer(texts)
    args = tiny_args(**{**SMALL, "vocab_size": tokenizer.n_words, **changes})
    llm = Llama(tiny_model(args), tokenizer, chat_format="llama2")
    admit = llm.engine.admit

    def scripted(inbox: Inbox, place: int, query: Query, strict: bool = False) -> Any:
        if query.pooling is None and query.refusal is None:
            script = Script(tokenizer, len(query.tokens), says(tokenizer.decode(list(query.tokens))))
            query = replace(query, params=replace(query.params, logits_processors=(script,)))
        return admit(inbox, place, query, strict)

    llm.engine.admit = scripted
    return llm


class Script:
    """Leaves one token possible in each place, the script's; then the end."""

    def __init__(self, tokenizer: WordTokenizer, start: int, text: str):
        self.start = start
        self.ids = tokenizer.encode(text, bos=False, eos=True)

    def __call__(self, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        place = len(tokens) - self.start
        forced = torch.full_like(logits, -torch.inf)
        forced[self.ids[min(place, len(self.ids) - 1)]] = 0
        return forced
