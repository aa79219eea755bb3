"""The only token loop: requests come and go at every step.

`add` puts a request in, `step` moves every running one on by a step of the model and tells what happened,
`abort` takes one out. Stop strings, logprobs, seeds and limits live here or nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, islice
from typing import Any, NamedTuple

import torch

from llama.runner import Runner, pick
from llama.sampling import Sampled, SampleRow, SamplingParams, logprobs_of, sample, top_logprobs
from llama.scheduler import Request, Scheduler, Slice, Step
from llama.tokenizer import StreamDecoder, Tokenizer

MAX_OPEN = 512  # requests that `run` has taken in at one time


class Logprob(NamedTuple):
    """A token, its log-probability under the raw logits, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_json(cls, entry: list[Any]) -> Logprob:
        token, logprob, top = entry
        return cls(token, logprob, tuple(tuple(pair) for pair in top))


@dataclass(frozen=True)
class Event:
    """What a step brought to one choice of one request."""

    request_id: int
    index: int  # which of the request's `n` choices
    token: int | None = None
    text: str = ""  # what may be shown now; text that could still become a stop string is held back
    logprob: Logprob | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None  # once, with the choice's last event
    finish_reason: str | None = None  # "stop", "length", "error" or "abort", with the last event
    error: str | None = None  # what went wrong, where the finish reason is "error"
    embedding: tuple[float, ...] | None = None  # with the last event, where pooling was asked for

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Event:
        """From what `dataclasses.asdict` made of one, with tuples turned into lists on the way."""

        if fields["logprob"] is not None:
            fields["logprob"] = Logprob.from_json(fields["logprob"])
        if fields["prompt_logprobs"] is not None:
            entries = fields["prompt_logprobs"]
            fields["prompt_logprobs"] = tuple(entry and Logprob.from_json(entry) for entry in entries)
        if fields["embedding"] is not None:
            fields["embedding"] = tuple(fields["embedding"])
        return cls(**fields)


@dataclass(frozen=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_referenced_blocks: int
    num_cached_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int


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


POOLINGS = ("mean", "last")


@dataclass(eq=False)
class Pool:
    """One vector out of all the states of a prompt: their mean, or the last one."""

    pooling: str
    total: torch.Tensor | None = None
    count: int = 0

    def take(self, start: int, states: torch.Tensor) -> None:
        """states (rows, dim) of the tokens from `start` on; a start at 0 begins anew, after a preemption."""
        if start == 0:
            self.total, self.count = torch.zeros(states.shape[1], device=states.device), 0
        if self.pooling == "mean":
            self.total += states.float().sum(0)
            self.count += len(states)
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
    unsaid: str = ""  # the prompt's text, where it is to be repeated before the answer
    pool: Pool | None = None
    num_generated: int = 0
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    def echo(self) -> str:
        """What goes in front of the choice's first text: the prompt, or nothing."""
        unsaid, self.unsaid = self.unsaid, ""
        return unsaid

    def sample_row(self) -> SampleRow:
        return SampleRow(
            params=self.params,
            tokens=self.request.tokens,
            num_prompt_tokens=self.request.num_prompt_tokens,
            key=(*self.seed, self.index, self.num_generated),
            banned=tuple(self.stop_ids) if self.num_generated < self.params.min_tokens else (),
        )


class Engine:
    """Many requests on one model. `stop_ids` end an answer; `seed` is what unseeded requests draw from."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        seed: int,
        stop_ids: frozenset[int],
    ):
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.seed = seed
        self.stop_ids = stop_ids
        self._request_ids = count()
        self._sequence_ids = count()
        self._choices: dict[Request, list[Choice]] = {}  # several only until their common prompt is computed
        self._num_open: dict[int, int] = {}  # by request id: choices whose last event is still to come
        self._events: list[Event] = []  # of requests that ended outside a step
        self._undelivered: dict[int, list[Event]] = {}
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    def add(
        self,
        prompt_tokens: list[int],
        params: SamplingParams,
        salt: bytes = b"",
        pooling: str | None = None,
    ) -> int:
        """Takes a request in and returns its id. Raises ValueError for one that can never run.

        `salt`: prefixes of the cache are shared only under the same one. With `pooling` ("mean" or "last") the
        request generates nothing, and its last event brings an embedding.
        """
        self.check(prompt_tokens, params, pooling)
        request_id = next(self._request_ids)
        room = 0 if pooling else self.max_seq_len - len(prompt_tokens)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        needs_whole_prompt = pooling is not None or params.prompt_logprobs is not None
        request = self._request(prompt_tokens, max_tokens, params, salt, not needs_whole_prompt)
        choices = [self._choice(request_id, index, params, request) for index in range(params.n)]
        if pooling:
            choices[0].pool = Pool(pooling)
        if max_tokens == 0 and not needs_whole_prompt:
            self._events += [self._end(choice, "length") for choice in choices]
        else:
            self.scheduler.add(request)
            self._choices[request] = choices
            self._num_prompt_tokens += len(prompt_tokens)
        self._num_open[request_id] = params.n
        return request_id

    def abort(self, request_id: int) -> None:
        """Ends a request wherever it stands; its last event says "abort". Ended requests are left alone."""
        for choices in list(self._choices.values()):
            if choices[0].request_id == request_id:
                self._events += [self._end(choice, "abort") for choice in choices]
        self._undelivered.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._choices or self._events)

    def step(self) -> list[Event]:
        """Runs the model once over what the scheduler chose; returns what happened to each choice."""
        events, self._events = self._events, []
        step = self.scheduler.schedule()
        if step.slices:
            events += self._run(step)
        for event in events:
            if event.finish_reason is not None:
                self._num_open[event.request_id] -= 1
                if self._num_open[event.request_id] == 0:
                    del self._num_open[event.request_id]
        return events

    def _run(self, step: Step) -> list[Event]:
        num_logits = [self._num_logits(piece) for piece in step.slices]
        try:
            output = self.runner.run(step, num_logits)
        except BaseException as error:  # also Ctrl-C: nobody knows what of the step is in the cache
            for piece in step.slices:
                choices = self._choices[piece.request]
                self._events += [
                    self._end(choice, "error", error=f"the step failed: {error}") for choice in choices
                ]
            self.scheduler.advance(step)
            raise
        self.scheduler.advance(step)
        events: list[Event] = []
        rows: list[int] = []
        choices: list[Choice] = []
        states = output.states.split([piece.count for piece in step.slices])
        ends = accumulate(num_logits)
        for piece, piece_states, number, end in zip(step.slices, states, num_logits, ends, strict=True):
            leader = self._choices[piece.request][0]
            if leader.pool is not None:
                leader.pool.take(piece.start, piece_states)
            if leader.wants_prompt_logprobs and number:
                self._score_prompt(leader, piece, output.logits[end - number : end])
            if not piece.samples:
                continue
            if piece.request.max_total_tokens == piece.request.num_prompt_tokens:
                events += [self._end(choice, "length") for choice in self._choices[piece.request]]
                continue
            for choice in self._separate(piece.request):
                rows.append(end - 1)
                choices.append(choice)
        if choices:
            sampled = sample(pick(output.logits, rows), [choice.sample_row() for choice in choices])
            events += [self._accept(choice, sampled, row) for row, choice in enumerate(choices)]
        return events

    def events(self, request_ids: Sequence[int]) -> Iterator[Event]:
        """Steps until these requests have ended, and yields their events. Left early, it aborts them.

        Several such loops may take turns in one program: each keeps the others' events for them.
        """
        return self._drain({request_id: self._num_open[request_id] for request_id in request_ids})

    def _drain(self, num_open: dict[int, int]) -> Iterator[Event]:
        try:
            while num_open:
                yield from self._round(num_open)
        finally:
            for request_id in num_open:
                self.abort(request_id)

    def run(
        self, requests: Iterable[tuple[list[int], SamplingParams]], pooling: str | None = None
    ) -> Iterator[Event]:
        """Answers any number of requests, taken in as earlier ones end; `request_id` is the place in `requests`.

        One that can never run ends at once with the finish reason "error". Left early, it aborts the rest.
        """
        numbered = enumerate(requests)
        places: dict[int, int] = {}
        num_open: dict[int, int] = {}
        try:
            while True:
                for place, (prompt, params) in islice(numbered, MAX_OPEN - len(num_open)):
                    try:
                        request_id = self.add(prompt, params, pooling=pooling)
                    except ValueError as error:
                        for index in range(params.n):
                            yield Event(place, index, finish_reason="error", error=str(error))
                        continue
                    places[request_id] = place
                    num_open[request_id] = params.n
                if not num_open:
                    return
                for event in self._round(num_open):
                    yield replace(event, request_id=places[event.request_id])
        finally:
            for request_id in num_open:
                self.abort(request_id)

    def _round(self, num_open: dict[int, int]) -> Iterator[Event]:
        """One step: the events of the open requests, which are counted down; others' are kept for them."""
        for event in self.step():
            self._undelivered.setdefault(event.request_id, []).append(event)
        for request_id in list(num_open):
            for event in self._undelivered.pop(request_id, ()):
                if event.finish_reason is not None:
                    num_open[request_id] -= 1
                    if num_open[request_id] == 0:
                        del num_open[request_id]
                yield event

    def stats(self) -> EngineStats:
        scheduler = self.scheduler.stats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.num_blocks,
            num_referenced_blocks=scheduler.num_referenced_blocks,
            num_cached_blocks=scheduler.num_cached_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def check(self, prompt_tokens: list[int], params: SamplingParams, pooling: str | None = None) -> None:
        """Raises ValueError, in one line, for a request that can never run."""
        if pooling not in (None, *POOLINGS):
            raise ValueError(f"pooling is {pooling!r}: give {' or '.join(POOLINGS)}")
        if not prompt_tokens:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt_tokens) > self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(prompt_tokens)} tokens, but max_seq_len is {self.max_seq_len}: "
                "shorten the prompt or raise max_seq_len"
            )
        vocab_size = self.runner.model.vocab_size
        outside = next((token for token in prompt_tokens if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"the prompt holds token {outside}, but the vocabulary has 0 ... {vocab_size - 1}"
            )
        params.check(vocab_size)

    def _request(
        self, tokens: list[int], max_tokens: int, params: SamplingParams, salt: bytes, reuse_prefix: bool
    ) -> Request:
        return Request(
            id=next(self._sequence_ids),
            tokens=list(tokens),
            max_total_tokens=len(tokens) + max_tokens,
            salt=salt,
            reuse_prefix=reuse_prefix,
            params=params,
        )

    def _choice(self, request_id: int, index: int, params: SamplingParams, request: Request) -> Choice:
        eos_ids = frozenset() if params.ignore_eos else self.stop_ids
        decoder = StreamDecoder(self.tokenizer)
        return Choice(
            request_id=request_id,
            index=index,
            params=params,
            request=request,
            decoder=decoder,
            unsaid="".join(decoder.push(token) for token in request.tokens) if params.echo else "",
            stop_text=StopText(params.stop),
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
            seed=(self.seed, request_id) if params.seed is None else (params.seed,),
        )

    def _num_logits(self, piece: Slice) -> int:
        """Of how many of the slice's last rows somebody wants logits."""
        request = piece.request
        in_prompt = piece.start < request.num_prompt_tokens - 1
        if in_prompt and self._choices[request][0].wants_prompt_logprobs:
            return piece.count
        return int(piece.samples)

    def _score_prompt(self, choice: Choice, piece: Slice, logits: torch.Tensor) -> None:
        """A row's logits speak of the token after it: row 0 scores token 1, and token 0 has no score."""
        if not choice.prompt_logprobs:
            choice.prompt_logprobs = [None] * choice.request.num_prompt_tokens
        first = piece.start + 1
        tokens = choice.request.tokens[first : min(first + piece.count, choice.request.num_prompt_tokens)]
        if not tokens:
            return
        logits = logits[: len(tokens)]
        scores = logprobs_of(logits, torch.tensor(tokens, device=logits.device)).tolist()
        tops: list[tuple] = [()] * len(tokens)
        if choice.params.prompt_logprobs:
            ids, values = top_logprobs(logits, choice.params.prompt_logprobs)
            tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        for position, entry in enumerate(zip(tokens, scores, tops, strict=True), first):
            choice.prompt_logprobs[position] = Logprob(*entry)

    def _separate(self, request: Request) -> list[Choice]:
        """The request's choices, each with a request of its own that shares the computed blocks."""
        choices = self._choices[request]
        for choice in choices[1:]:
            choice.request = self._request(
                request.tokens,
                request.max_total_tokens - len(request.tokens),
                choice.params,
                request.salt,
                request.reuse_prefix,
            )
            choice.prompt_logprobs = choices[0].prompt_logprobs
            self.scheduler.fork(request, choice.request)
            self._choices[choice.request] = [choice]
        self._choices[request] = choices[:1]
        return choices

    def _accept(self, choice: Choice, sampled: Sampled, row: int) -> Event:
        """Adds the token sampled for a choice and decides whether the choice goes on."""
        if row in sampled.errors:
            return self._end(choice, "error", error=str(sampled.errors[row]))
        if not sampled.finite[row]:
            place = f"position {len(choice.request.tokens)} of request {choice.request_id}"
            return self._end(choice, "error", error=f"the logits at {place} are not finite or all excluded")
        token = sampled.tokens[row]
        logprob = None
        if choice.params.logprobs is not None:
            logprob = Logprob(token, sampled.logprobs[row], tuple(sampled.top[row]))
        self.scheduler.append(choice.request, token)
        choice.num_generated += 1
        self._num_generated_tokens += 1
        if token in choice.stop_ids:
            return self._end(choice, "stop")
        known = token < self.tokenizer.n_words  # a model's table may be padded beyond its vocabulary
        text, stopped = choice.stop_text.push(choice.decoder.push(token) if known else "")
        if stopped:
            return self._end(choice, "stop", token=token, text=text, logprob=logprob, flush=False)
        if len(choice.request.tokens) == choice.request.max_total_tokens:
            return self._end(choice, "length", token=token, text=text, logprob=logprob)
        return Event(choice.request_id, choice.index, token, choice.echo() + text, logprob)

    def _end(
        self, choice: Choice, finish_reason: str, text: str = "", flush: bool = True, **fields: Any
    ) -> Event:
        """The choice's last event; its blocks go back. Text that was held back is shown unless it was a stop."""
        if choice.request in self._choices:
            del self._choices[choice.request]
            self.scheduler.finish(choice.request)
        if flush:
            text += choice.stop_text.flush(choice.decoder.flush())
        return Event(
            choice.request_id,
            choice.index,
            text=choice.echo() + text,
            prompt_logprobs=tuple(choice.prompt_logprobs) if choice.wants_prompt_logprobs else None,
            finish_reason=finish_reason,
            embedding=choice.pool and choice.pool.vector() if finish_reason == "length" else None,
            **fields,
        )
