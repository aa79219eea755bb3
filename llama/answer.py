"""What a caller asks of the engine, and what comes back: a query, the events of each step, a completion, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from llama.sampling_params import SamplingParams
from llama.tool_call import ToolCall

FinishReason = Literal["stop", "length", "error", "abort"]
Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")


class PromptTooLong(ValueError):
    """The prompt has more tokens than the model's context."""


@dataclass(frozen=True)
class Query:
    """A prompt and what is asked for: `params.n` answers to it, or with `pooling` one vector of its states.

    `salt`: prefixes of the cache are shared only under the same one. `adapter`: the name of one that was loaded beside
    the model. `refusal`: the answer to what a chat format refuses; such a query never reaches the model.
    """

    tokens: Sequence[int]
    params: SamplingParams  # resolved
    pooling: Pooling | None = None
    salt: bytes = b""
    adapter: str | None = None
    refusal: str | None = None


class Logprob(NamedTuple):
    """A token, its log-probability under the raw logits, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_json(cls, entry: list[Any] | None) -> Logprob | None:
        if entry is None:
            return None
        token, logprob, top = entry
        return cls(token, logprob, tuple(tuple(pair) for pair in top))


@dataclass(frozen=True)
class Completion:
    """One answer. With `echo`, text and tokens begin with the prompt's."""

    text: str
    tokens: list[int]  # without the token that ended it
    finish_reason: FinishReason
    logprobs: list[Logprob] | None = None  # of the generated tokens
    prompt_logprobs: list[Logprob | None] | None = None  # the first token has none
    stop: str | None = None  # the stop string that ended it
    error: str | None = None  # what went wrong, where the finish reason is "error"
    refused: bool = False  # the chat format refuses the dialog: the text says so
    embedding: tuple[float, ...] | None = None  # where pooling was asked for
    tool_calls: tuple[ToolCall, ...] = ()  # where tools were offered; the text is what is said besides
    num_cached_tokens: int = field(default=0, compare=False)  # of the prompt, that need not be computed
    place: int = field(default=0, compare=False)  # of its query among those that were given
    index: int = field(default=0, compare=False)  # which of the query's n answers

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Completion:
        """From what `dataclasses.asdict` made of one, with tuples turned into lists on the way."""
        for name in ("logprobs", "prompt_logprobs"):
            if fields[name] is not None:
                fields[name] = [Logprob.from_json(entry) for entry in fields[name]]
        if fields["embedding"] is not None:
            fields["embedding"] = tuple(fields["embedding"])
        fields["tool_calls"] = tuple(ToolCall(**call) for call in fields["tool_calls"])
        return cls(**fields)


@dataclass(frozen=True)
class Event:
    """What a step brought to one choice of one request."""

    request_id: int
    index: int  # which of the request's `n` choices
    token: int | None = None
    text: str = ""  # what may be shown now; text that could still become a stop string is held back
    logprob: Logprob | None = None
    completion: Completion | None = None  # the whole answer, with the choice's last event

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until the last event."""
        return self.completion and self.completion.finish_reason

    @property
    def error(self) -> str | None:
        return self.completion and self.completion.error

    def at(self, place: int) -> Event:
        """The same under the number of its query instead of the engine's own."""
        completion = self.completion and replace(self.completion, place=place)
        return replace(self, request_id=place, completion=completion)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Event:
        """From what `to_json` made of one, with tuples turned into lists on the way."""
        fields["logprob"] = Logprob.from_json(fields["logprob"])
        if fields["completion"] is not None:
            fields["completion"] = Completion.from_json(fields["completion"])
        return cls(**fields)


@dataclass(frozen=True)
class EngineStats:
    """What an engine does now, and what it has done since it was made."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_referenced_blocks: int
    num_cached_blocks: int
    num_preemptions: int
    num_queried_tokens: int  # of prompts that were looked up among the cached blocks
    num_hit_tokens: int  # of those, found there
    num_prompt_tokens: int
    num_generated_tokens: int
    num_drafts: int  # how often tokens were guessed behind a request's last one
    num_draft_tokens: int
    num_accepted_tokens: int  # of those, found right


@dataclass(eq=False)
class Inbox:
    """The events that one caller of `run` waits for."""

    places: dict[int, int] = field(default_factory=dict)  # request id -> the query's number
    num_open: dict[int, int] = field(default_factory=dict)  # request id -> choices that have not ended
    events: list[Event] = field(default_factory=list)

    def expect(self, request_id: int, place: int, num_choices: int) -> None:
        self.places[request_id], self.num_open[request_id] = place, num_choices

    def take(self) -> list[Event]:
        """What has come since the last time, under the queries' numbers; requests that ended are forgotten."""
        events, self.events = self.events, []
        placed = [event.at(self.places[event.request_id]) for event in events]
        for event in events:
            self.num_open[event.request_id] -= event.completion is not None
            if self.num_open[event.request_id] == 0:
                del self.num_open[event.request_id], self.places[event.request_id]
        return placed


def answered(completions: list[Completion]) -> list[Completion]:
    """The completions, if none of them failed; a refusal is an answer."""
    for completion in completions:
        if completion.finish_reason == "error" and not completion.refused:
            raise RuntimeError(completion.error)
    return completions


def unit_vectors(completions: Sequence[Completion]) -> torch.Tensor:
    """Their embeddings, each of length 1: (completions, dim) float32."""
    rows = [completion.embedding for completion in completions]
    vectors = torch.tensor(rows, dtype=torch.float32)
    return torch.nn.functional.normalize(vectors) if rows else vectors.view(0, 0)


def flat_logprobs(completion: Completion) -> list[float]:
    """One number a token, the reference's way: an echoed prompt's first token has 0.0."""
    entries = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
    return [0.0 if entry is None else entry.logprob for entry in entries]
