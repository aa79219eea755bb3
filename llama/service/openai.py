"""What OpenAI's answers have in common: their head, the usage, log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama.answer import Completion, Event, Logprob, Query
from llama.service.call import Call
from llama.service.fields import Fields
from llama.service.frames import Delta, Frames, deltas, json_line, server_sent
from llama.service.refusal import Refusal
from llama.tokenizer import StreamDecoder, Tokenizer
from llama.version import VERSION

FINGERPRINT = f"llama-native-{VERSION}"


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's
    include_obfuscation: bool | None = None  # taken and left alone


def head(call: Call, prefix: str, kind: str) -> dict[str, Any]:
    """What an answer begins with, and each chunk of it."""
    return {
        "id": f"{prefix}-{call.id}",
        "object": kind,
        "created": call.created,
        "model": call.model,
        "system_fingerprint": FINGERPRINT,
    }


@dataclass
class Usage:
    """How many tokens a call took. An echoed prompt is in its completions' tokens, but nobody generated it."""

    num_prompt_tokens: int
    num_cached_tokens: dict[int, int] = field(default_factory=dict)  # of a query, by its place
    num_generated_tokens: int = 0

    @classmethod
    def of(cls, queries: Sequence[Query], completions: Sequence[Completion] = ()) -> Usage:
        usage = cls(sum(len(query.tokens) for query in queries))
        for completion in completions:
            query = queries[completion.place]
            usage.num_cached_tokens[completion.place] = completion.num_cached_tokens
            usage.num_generated_tokens += len(completion.tokens) - len(query.tokens) * query.params.echo
        return usage

    def take(self, delta: Delta) -> None:
        self.num_generated_tokens += len(delta.tokens)
        if delta.completion is not None:
            self.num_cached_tokens[delta.place] = delta.completion.num_cached_tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens.values())},
        }


class OpenAIFrames(Frames):
    """A data line a chunk, then the usage, if that is wanted, and [DONE]; an error is a data line too.

    With `continuous_usage_stats` every chunk tells the usage so far.
    """

    def __init__(self, call: Call, prefix: str, kind: str):
        self._opened = json_line(head(call, prefix, kind))[:-1]  # for more to be written behind it
        self._usage = Usage.of(call.queries)
        self._options: StreamOptions = call.body.stream_options or StreamOptions()

    def push(self, events: Sequence[Event]) -> str:
        frames = []
        for delta in deltas(events):
            self._usage.take(delta)
            frames.append(self.frame(delta))
        return "".join(frames)

    @abstractmethod
    def frame(self, delta: Delta) -> str:
        """What to send of one choice; "" where there is nothing yet."""

    def chunk(self, choices: str) -> str:
        """A data line of these choices, which are JSON."""
        usage = ""
        if self._options.include_usage:
            usage = f',"usage":{self._usage_json() if self._options.continuous_usage_stats else "null"}'
        return server_sent(f'{self._opened},"choices":[{choices}]{usage}}}')

    def end(self) -> str:
        usage = f'{self._opened},"choices":[],"usage":{self._usage_json()}}}'
        return (server_sent(usage) if self._options.include_usage else "") + server_sent("[DONE]")

    def fail(self, refusal: Refusal) -> str:
        return server_sent(json_line(refusal.to_json())) + server_sent("[DONE]")

    def _usage_json(self) -> str:
        return json_line(self._usage.to_json())


def chat_logprobs(logprobs: Sequence[Logprob] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {"content": logprob_entries(logprobs, tokenizer), "refusal": None}


def logprob_entries(logprobs: Sequence[Logprob | None], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """Of each token what it is, byte by byte, and the likeliest in its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(token, tokenizer)
        text = content.decode(errors="replace")
        return {"id": token, "token": text, "logprob": logprob, "bytes": list(content)}  # the id is llama.cpp's

    return [
        item and {**entry(item.token, item.logprob), "top_logprobs": [entry(*pair) for pair in item.top]}
        for item in logprobs
    ]


def text_logprobs(entries: Sequence[Logprob | None], tokens: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of tokens and what is known of each; where they stand in the text is the caller's to add."""

    def text(token: int) -> str:
        return token_bytes(token, tokenizer).decode(errors="replace")

    return {
        "tokens": [text(token) for token in tokens],
        "token_logprobs": [entry and entry.logprob for entry in entries],
        "top_logprobs": [entry and top_texts(entry, text) for entry in entries],
    }


def top_texts(entry: Logprob, text: Any) -> dict[str, float]:
    """By their texts, with the token itself, as OpenAI has it: the likeliest of those that look alike counts."""
    found: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        found.setdefault(text(token), logprob)
    return found


def token_bytes(token: int, tokenizer: Tokenizer) -> bytes:
    """A model's table may be padded with ids that no tokenizer knows: they have no text."""
    return tokenizer.token_bytes(token) if token < tokenizer.n_words else b""


class TextOffsets:
    """Where in an answer's text each token begins.

    A token in the midst of a character begins where the character does, one behind a stop string at the end.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)
        self._num_words = tokenizer.n_words
        self._end = 0

    def take(self, tokens: Sequence[int], num_characters: int | None = None) -> list[int]:
        """Of further tokens; `num_characters` is the length of the whole text, where it is known."""
        offsets = []
        for token in tokens:
            offsets.append(self._end if num_characters is None else min(self._end, num_characters))
            self._end += len(self._decoder.push(token)) if token < self._num_words else 0
        return offsets


def text_offsets(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    return TextOffsets(tokenizer).take(completion.tokens, len(completion.text))
