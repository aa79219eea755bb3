"""What a caller asks of the engine, and what comes back: a query, the events of each step, a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from llama.request import Request
from llama.sampling import SampleRow, logprobs_of, top_logprobs
from llama.sampling_params import SamplingParams
from llama.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "error", "abort"]
Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")


@dataclass(frozen=True)
class Query:
    """A prompt and what is asked for: `params.n` answers to it, or with `pooling` one vector of its states.

    `salt`: prefixes of the cache are shared only under the same one. `refusal`: the answer to what a chat format
    refuses; such a query never reaches the model.
    """

    tokens: Sequence[int]
    params: SamplingParams  # resolved
    pooling: Pooling | None = None
    salt: bytes = b""
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
    error: str | None = None  # what went wrong, where the finish reason is "error"
    refused: bool = False  # the chat format refuses the dialog: the text says so
    embedding: tuple[float, ...] | None = None  # where pooling was asked for
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


class StopText:
    """Lets text through until one of the stop strings appears; holds back what could be the start of one."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was reached (it is not shown)."""
        self.held += text
        found = [position for stop in self.stop if (position := self.held.find(stop)) >= 0]
        if found:
            return self.held[: min(found)], True
        keep = max((self._overlap(stop) for stop in self.stop), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, False

    def flush(self, text: str) -> str:
        """The last text, with what was held back, cut at a stop string."""
        shown, stopped = self.push(text)
        return shown if stopped else shown + self.held

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Pool:
    """One vector out of all the states of a prompt: their mean, or the last one."""

    pooling: Pooling
    total: torch.Tensor | None = None
    count: int = 0

    def take(self, start: int, states: torch.Tensor) -> None:
        """states (rows, dim) of the tokens from `start` on; a start at 0 begins anew, after a preemption."""
        if start == 0:
            self.total, self.count = states.new_zeros(states.shape[1], dtype=torch.float32), 0
        if self.pooling == "mean":
            self.total += states.float().sum(0)
            self.count += states.shape[0]
        else:
            self.total, self.count = states[-1].float(), 1

    def vector(self) -> tuple[float, ...]:
        return tuple((self.total / self.count).tolist())


@dataclass(eq=False)
class Choice:
    """One choice of a request on its way: what it may do, and what it has produced."""

    request_id: int
    index: int
    params: SamplingParams
    request: Request
    decoder: StreamDecoder
    stop_text: StopText
    stop_ids: frozenset[int]
    seed: tuple[int, ...]
    prompt_logprobs: list[Logprob | None]  # of the prompt's tokens, as they are computed
    pool: Pool | None = None
    echo: str = ""  # the prompt's text, to go in front of the first event's; then empty
    tokens: list[int] = field(default_factory=list)  # with `echo` the prompt's too
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    num_generated: int = 0

    def __post_init__(self) -> None:
        if self.params.echo:
            self.tokens = list(self.request.tokens)
            self.echo = "".join(map(self.decoder.push, self.tokens))

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    def sample_row(self, ahead: Sequence[int] = ()) -> SampleRow:
        """How the token behind the request's own, and behind those `ahead` that may come to be its own, is chosen."""
        num_generated = self.num_generated + len(ahead)
        return SampleRow(
            params=self.params,
            tokens=[*self.request.tokens, *ahead] if ahead else self.request.tokens,
            num_prompt_tokens=self.request.num_prompt_tokens,
            key=(*self.seed, self.index, num_generated),
            banned=tuple(self.stop_ids) if num_generated < self.params.min_tokens else (),
        )

    def score_prompt(self, start: int, logits: torch.Tensor) -> None:
        """Takes the logits (rows, vocab_size) of the prompt's tokens from `start` on.

        A row's logits speak of the token after it: row 0 scores token 1, and token 0 has no score.
        """
        first = start + 1
        tokens = self.request.tokens[first : min(first + logits.shape[0], self.request.num_prompt_tokens)]
        if not tokens:
            return
        logits = logits[: len(tokens)]
        scores = logprobs_of(logits, torch.tensor(tokens, device=logits.device)).tolist()
        tops: list[tuple] = [()] * len(tokens)
        if self.params.prompt_logprobs:
            ids, values = top_logprobs(logits, self.params.prompt_logprobs)
            tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        for position, entry in enumerate(zip(tokens, scores, tops, strict=True), first):
            self.prompt_logprobs[position] = Logprob(*entry)

    def event(self, text: str, token: int | None = None, logprob: Logprob | None = None) -> Event:
        """What a step brought; it joins the answer."""
        text, self.echo = self.echo + text, ""
        self.texts.append(text)
        if token is not None:
            self.tokens.append(token)
            if logprob is not None:
                self.logprobs.append(logprob)
        return Event(self.request_id, self.index, token, text, logprob)

    def end(
        self, finish_reason: FinishReason, text: str = "", error: str | None = None, **fields: Any
    ) -> Event:
        """The last event. `fields`: of a token that comes with it."""
        event = self.event(text, **fields)
        completion = Completion(
            text="".join(self.texts),
            tokens=self.tokens,
            finish_reason=finish_reason,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs if self.wants_prompt_logprobs else None,
            error=error,
            embedding=self.pool.vector() if self.pool and finish_reason == "length" else None,
            index=self.index,
        )
        return replace(event, completion=completion)
