"""One choice of a request: what it may do, what it has produced, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from llama.answer import Completion, Event, FinishReason, Logprob, Pooling
from llama.request import Request
from llama.sampling import Sampled, SampleRow, logprobs_of, top_logprobs
from llama.sampling_params import SamplingParams
from llama.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from llama.constraints import Matcher  # and llguidance, for answers that are constrained


class StopText:
    """Lets text through until one of the stop strings appears; holds back what could be the start of one."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.held = ""
        self.reached: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was reached (it is not shown)."""
        self.held += text
        found = [(position, stop) for stop in self.stop if (position := self.held.find(stop)) >= 0]
        if found:
            first, self.reached = min(found)
            return self.held[:first], True
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
    num_words: int  # of the tokenizer; ids from there on have no text
    decoder: StreamDecoder
    stop_text: StopText
    stop_ids: frozenset[int]
    seed: tuple[int, ...]
    prompt_logprobs: list[Logprob | None]  # of the prompt's tokens, as they are computed
    pool: Pool | None = None
    matcher: Matcher | None = None  # what constrains the answer
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

    @property
    def can_be_guessed(self) -> bool:
        """Whether its next token depends on its tokens alone, and not on a state that cannot be taken back."""
        return self.pool is None and self.matcher is None and not self.params.logits_processors

    def sample_row(self, ahead: Sequence[int] = ()) -> SampleRow:
        """How the token behind the request's own, and behind those `ahead` that may come to be its own, is chosen."""
        num_generated = self.num_generated + len(ahead)
        may_stop = num_generated >= self.params.min_tokens and not (self.matcher and self.params.ignore_eos)
        return SampleRow(
            params=self.params,
            tokens=[*self.request.tokens, *ahead] if ahead else self.request.tokens,
            num_prompt_tokens=self.request.num_prompt_tokens,
            key=(*self.seed, self.index, num_generated),
            banned=() if may_stop or self.matcher else tuple(self.stop_ids),
            allowed=self.matcher.allowed(ahead, may_stop) if self.matcher else None,
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

    def accept(self, token: int, logprob: Logprob | None) -> Event:
        """Adds a token that was sampled for it, and that its request has by now; the last event where that ends it."""
        self.num_generated += 1
        if token in self.stop_ids:
            return self.end("stop")
        if self.matcher is not None:
            self.matcher.take(token)
        known = token < self.num_words  # a model's table may be padded beyond its vocabulary
        text, stopped = self.stop_text.push(self.decoder.push(token) if known else "")
        if stopped:
            return self._last(self.event(text, token, logprob), "stop")
        if self.matcher is not None and self.matcher.is_complete:
            return self._last(self.event(text + self._held(), token, logprob), "stop")
        if len(self.request.tokens) == self.request.max_total_tokens:
            return self._last(self.event(text + self._held(), token, logprob), "length")
        return self.event(text, token, logprob)

    def end(self, finish_reason: FinishReason, error: str | None = None) -> Event:
        """The last event where no token ends it; text that was held back is shown."""
        return self._last(self.event(self._held()), finish_reason, error)

    def _held(self) -> str:
        """What could have become a stop string, or was half a character."""
        return self.stop_text.flush(self.decoder.flush())

    def _last(self, event: Event, finish_reason: FinishReason, error: str | None = None) -> Event:
        """The event with the whole answer."""
        completion = Completion(
            text="".join(self.texts),
            tokens=self.tokens,
            finish_reason=finish_reason,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs if self.wants_prompt_logprobs else None,
            error=error,
            stop=self.stop_text.reached,
            embedding=self.pool.vector() if self.pool and finish_reason == "length" else None,
            num_cached_tokens=self.request.num_cached_tokens,
            index=self.index,
        )
        return replace(event, completion=completion)


@dataclass(frozen=True)
class Turn:
    """A choice whose next tokens a step decides: one behind the request's last token, and one behind each guess.

    Without `rows` there is nothing to decide: its prompt is all that was asked about.
    """

    choice: Choice
    guesses: Sequence[int]
    rows: range  # of the step's logits
    first: int  # its first row's place among all that are sampled

    def samples(self) -> list[SampleRow]:
        """How each token is chosen, as if the guesses before it were right."""
        return [self.choice.sample_row(self.guesses[:i]) for i in range(len(self.rows))]

    def num_right(self, sampled: Sampled) -> int:
        """How many guesses are what was sampled in their place, up to the first that is not."""
        right = [guess == sampled.tokens[self.first + i] for i, guess in enumerate(self.guesses)]
        return [*right, False].index(False)
