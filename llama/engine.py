"""The only token loop: requests come and go at every step.

`add` puts a query in, `step` moves every running one on by a step of the model and tells what happened, `abort` takes
one out, `run` answers any number of them. Stop strings, logprobs, seeds and limits live here or nowhere.

Several threads may call one engine: whoever holds the lock runs a step for all, and every caller of `run` finds its own
events in its inbox.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

from llama.answer import POOLINGS, Completion, EngineStats, Event, FinishReason, Inbox, Logprob, PromptTooLong, Query
from llama.choice import Choice, Pool, StopText, Turn
from llama.drafters import Drafter
from llama.lora import Adapters, Change, LoadedAdapter
from llama.request import Request, Slice, Step
from llama.runner import Output, Pack, Runner, pick
from llama.sampling import Sampled, sample
from llama.scheduler import Scheduler
from llama.speculation import Speculation, step_clock
from llama.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from llama.constraints import Constraints

MAX_OPEN = 512  # queries that one `run` has taken in at one time


class Engine:
    """Many requests on one model. `stop_ids` end an answer; `seed` is what unseeded requests draw from.

    With `can_generate` false there are only embeddings, because the model's logits mean nothing. A `drafter` guesses
    tokens ahead: answers stay what they are, and come sooner.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        seed: int,
        stop_ids: frozenset[int],
        can_generate: bool = True,
        drafter: Drafter | None = None,
    ):
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.seed = int(seed)
        self.stop_ids = stop_ids
        self.can_generate = can_generate
        self.speculation = Speculation(drafter, step_clock(runner.device.type), runner.rows_alone)
        self._request_ids = count()
        self._sequence_ids = count()
        self._choices: dict[Request, list[Choice]] = {}  # several only until their common prompt is computed
        self._adapter_of: dict[int, LoadedAdapter] = {}  # by request id
        self._open: dict[int, list[Choice]] = {}  # by request id: the choices that have not ended
        self._events: list[Event] = []  # what the next step tells besides its own
        self._inboxes: dict[int, Inbox] = {}  # by request id
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._lock = threading.RLock()
        self._is_stepping = False
        self._aborts: list[int] = []  # asked for in the middle of a step
        self._process = os.getpid()

    # ---- requests come and go

    def add(self, query: Query) -> int:
        """Takes a query in and returns its request's id. Raises ValueError for one that can never run.

        With `pooling` nothing is generated, and the completion has an embedding.
        """
        self._check_process()
        self.validate(query)
        params = query.params
        room = 0 if query.pooling else self.max_seq_len - len(query.tokens)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        needs_whole_prompt = query.pooling is not None or params.prompt_logprobs is not None
        with self._lock:
            request_id = next(self._request_ids)
            salt = query.salt + self.runner.salt(len(query.tokens) + max_tokens)
            adapter = None if query.adapter is None else self.adapters.find(query.adapter)
            if adapter is not None:
                salt = adapter.digest + salt
            group = 0 if adapter is None else adapter.number
            request = self._request(query.tokens, max_tokens, salt, not needs_whole_prompt, group)
            choices = self._new_choices(request_id, query, request)
            if max_tokens or needs_whole_prompt:
                self.scheduler.add(request)
                self._choices[request] = choices
                self._num_prompt_tokens += len(query.tokens)
            self._open[request_id] = list(choices)
            if adapter is not None:
                self._adapter_of[request_id] = adapter
                self.adapters.hold(adapter)
            if request not in self._choices:
                for choice in choices:
                    self._end(choice, "length")
        return request_id

    def abort(self, request_id: int) -> None:
        """Ends a request wherever it stands; its last event says "abort". Ended requests are left alone."""
        with self._lock:
            if self._is_stepping:  # a stream was collected as garbage in the middle of this very thread's step
                self._aborts.append(request_id)
                return
            for choice in list(self._open.get(request_id, ())):
                self._end(choice, "abort")

    def abort_all(self) -> None:
        """Ends every request."""
        with self._lock:
            for request_id in list(self._open):
                self.abort(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._open or self._events)

    # ---- the loop

    def step(self) -> list[Event]:
        """Runs the model once over what the scheduler chose; returns what happened to each choice.

        Where the model fails its error is raised, the step's requests end, and the next step tells so.
        """
        self._check_process()
        with self._lock:
            step = self.scheduler.schedule()
            choices = [choice for part in step.slices for choice in self._choices[part.request]]
            self._is_stepping = True
            try:
                if step.slices:
                    step = self.speculation.widen(self.scheduler, step, self._choices)
                    started = self.speculation.clock()
                    num_logits = [self._num_logits(part) for part in step.slices]
                    pooled = any(choice.pool is not None for choice in choices)
                    output = self.runner.run(Pack.of(step, num_logits, self.scheduler.block_size, pooled))
                    turns = self._turns(step, output, num_logits)
                    rows = [row for turn in turns for row in turn.rows]
                    samples = [row for turn in turns for row in turn.samples()]
                    sampled = sample(pick(output.logits, rows), samples)
                    self.speculation.learn(turns, sampled, self.speculation.clock() - started)
                    wrong = {t.choice.request: len(t.guesses) - t.num_right(sampled) for t in turns}
                    counts = [part.count - wrong.get(part.request, 0) for part in step.slices]
                    self.scheduler.advance(step, counts)
                    for turn in turns:
                        self._separate(turn.choice)
                    for turn in turns:
                        self._accept(turn, sampled)
            except BaseException as error:  # also Ctrl-C: nobody knows what of the step is in the cache
                for choice in choices:
                    self._end(choice, "error", f"the step failed: {error}")
                self.scheduler.cancel(step)
                raise
            finally:
                self._is_stepping = False
                while self._aborts:
                    self.abort(self._aborts.pop())
            return self._deliver()

    def run(self, queries: Iterable[Query], strict: bool = False) -> Iterator[list[Event]]:
        """Answers any number of queries, taken in as earlier ones end: the events of each step.

        An event's `request_id` is its query's place in `queries`. A query that can never run ends at once with the
        finish reason "error"; with `strict` it raises ValueError. Left early, it aborts the rest.
        """
        waiting = enumerate(queries)
        inbox = Inbox()
        try:
            while True:
                while len(inbox.places) < MAX_OPEN and (item := next(waiting, None)):
                    if refusals := self.admit(inbox, *item, strict):
                        yield refusals
                if not inbox.places:
                    return
                with self._lock:  # whoever has it may have run a step for us
                    if not inbox.events:
                        self.step()
                    if not inbox.events and not inbox.places.keys() <= self._open.keys():
                        raise RuntimeError("a request is gone, and its last event with it")
                    events = inbox.take()
                yield events
        finally:
            self.leave(inbox)

    def admit(self, inbox: Inbox, place: int, query: Query, strict: bool = False) -> list[Event]:
        """Takes a query in whose events go to `inbox`; returns the events of one that is refused.

        With `strict` a query that can never run raises ValueError.
        """
        if query.refusal is not None:
            answer = Completion(query.refusal, [], "error", error=query.refusal, refused=True)
        else:
            try:
                self._compile(query)  # here, where others need not wait for it
                with self._lock:
                    request_id = self.add(query)
                    self._inboxes[request_id] = inbox
                    inbox.expect(request_id, place, query.params.n)
                return []
            except ValueError as error:
                if strict:
                    raise
                answer = Completion("", [], "error", error=str(error))
        return [
            Event(place, index, text=answer.text, completion=replace(answer, place=place, index=index))
            for index in range(query.params.n)
        ]

    def leave(self, inbox: Inbox) -> None:
        """Ends what is left of an inbox's requests; nobody is told."""
        for request_id in list(inbox.places):
            self._inboxes.pop(request_id, None)
            self.abort(request_id)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler.stats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.num_blocks,
            num_referenced_blocks=scheduler.num_referenced_blocks,
            num_cached_blocks=scheduler.num_cached_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_queried_tokens=scheduler.num_queried_tokens,
            num_hit_tokens=scheduler.num_hit_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_drafts=self.speculation.num_drafts,
            num_draft_tokens=self.speculation.num_draft_tokens,
            num_accepted_tokens=self.speculation.num_accepted_tokens,
        )

    def validate(self, query: Query) -> None:
        """Raises ValueError, in one line, for a query that can never run.

        A constraint is compiled here, in the caller's thread and without the lock; `add` finds it again.
        """
        tokens = query.tokens
        if query.pooling not in (None, *POOLINGS):
            raise ValueError(f"pooling is {query.pooling!r}: give {' or '.join(POOLINGS)}")
        if query.pooling is None and not self.can_generate:
            raise ValueError("this model has no output layer: it embeds texts, and cannot generate or score any")
        if not tokens:
            raise ValueError("the prompt is empty: give at least one token")
        if len(tokens) > self.max_seq_len:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens, but max_seq_len is {self.max_seq_len}: "
                "shorten the prompt or raise max_seq_len"
            )
        vocab_size = self.runner.vocab_size
        outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ValueError(f"the prompt holds token {outside}, but the vocabulary has 0 ... {vocab_size - 1}")
        if query.adapter is not None:
            self.adapters.find(query.adapter)
        query.params.validate(vocab_size)
        self._compile(query)

    def prepare_constraints(self) -> None:
        """Makes what the first constraint would make in the midst of others' answers: it holds all threads."""
        if self.can_generate:
            self._constraints.prepare()

    # ---- adapters

    @property
    def adapters(self) -> Adapters:
        return self.runner.adapters

    def load_adapter(self, name: str, digest: bytes, changes: Mapping[str, Sequence[Change]]) -> None:
        """Queries may name it from now on. Raises ValueError for a name that is taken."""
        with self._lock:
            self.adapters.add(name, digest, changes)

    def unload_adapter(self, name: str) -> None:
        """Queries may not name it any more; those on their way end with it. Raises ValueError for an unknown name."""
        with self._lock:
            self.adapters.remove(name)

    # ---- how it is done

    @cached_property
    def _constraints(self) -> Constraints:
        from llama.constraints import Constraints  # llguidance, for answers that are constrained

        return Constraints(self.tokenizer, self.runner.vocab_size, self.stop_ids)

    def _compile(self, query: Query) -> None:
        """Raises ValueError for a constraint that cannot be kept; one that can is found again later."""
        if query.params.shape is not None:
            self._constraints.validate(query.params)

    def _check_process(self) -> None:
        if os.getpid() != self._process:  # the parent's threads, which hold its locks, are not here
            raise RuntimeError(
                f"this model was built in process {self._process}, and a forked child cannot use it: "
                "build it in the child, or start processes with the method 'spawn'"
            )

    def _deliver(self) -> list[Event]:
        """The events so far; those of a caller of `run` are put into its inbox too, and nobody else's are kept."""
        events, self._events = self._events, []
        for event in events:
            if event.request_id in self._inboxes:
                self._inboxes[event.request_id].events.append(event)
        for event in events:
            if event.request_id not in self._open:
                self._inboxes.pop(event.request_id, None)
        return events

    def _request(self, tokens: Sequence[int], max_tokens: int, salt: bytes, reuse_prefix: bool, group: int) -> Request:
        return Request(
            id=next(self._sequence_ids),
            tokens=list(tokens),
            max_total_tokens=len(tokens) + max_tokens,
            salt=salt,
            reuse_prefix=reuse_prefix,
            group=group,
        )

    def _new_choices(self, request_id: int, query: Query, request: Request) -> list[Choice]:
        """The query's choices: what is found out about their common prompt is theirs in common."""
        params = query.params
        is_constrained = params.shape is not None  # then it may have to stop, whatever ignore_eos says
        stop_ids = frozenset(params.stop_token_ids)
        if is_constrained or not params.ignore_eos:
            stop_ids |= self.stop_ids
        prompt_logprobs = [None] * len(query.tokens)
        pool = query.pooling and Pool(query.pooling)
        return [
            Choice(
                request_id=request_id,
                index=index,
                params=params,
                request=request,
                num_words=self.tokenizer.n_words,
                decoder=StreamDecoder(self.tokenizer),
                stop_text=StopText(params.stop),
                stop_ids=stop_ids,
                seed=(self.seed, request_id) if params.seed is None else (params.seed,),
                prompt_logprobs=prompt_logprobs,
                pool=pool,
                matcher=self._constraints.matcher(params, stop_ids) if is_constrained else None,
            )
            for index in range(params.n)
        ]

    def _num_logits(self, part: Slice) -> int:
        """Of how many of the slice's last rows somebody wants logits."""
        in_prompt = part.start < part.request.num_prompt_tokens - 1
        if in_prompt and self._choices[part.request][0].wants_prompt_logprobs:
            return part.count
        return part.num_sampled

    def _turns(self, step: Step, output: Output, num_logits: Sequence[int]) -> list[Turn]:
        """The choices whose next tokens the step decides. Prompts are scored and pooled on the way."""
        turns: list[Turn] = []
        num_states = end = num_sampled = 0
        for part, num_own in zip(step.slices, num_logits, strict=True):
            first, *others = self._choices[part.request]  # the others' prompt is the same
            num_states += part.count
            end += num_own
            if first.pool is not None:
                first.pool.take(part.start, output.states[num_states - part.count : num_states])
            if first.wants_prompt_logprobs:
                first.score_prompt(part.start, output.logits[end - num_own : end])
            count = part.num_sampled
            if not count:
                continue
            if part.request.max_total_tokens == part.request.num_prompt_tokens:
                turns += [Turn(choice, (), range(0), num_sampled) for choice in (first, *others)]
                continue
            for choice in (first, *others):
                guesses = part.tokens[part.count - count + 1 :]
                turns.append(Turn(choice, guesses, range(end - count, end), num_sampled))
                num_sampled += count
        return turns

    def _separate(self, choice: Choice) -> None:
        """Gives a choice a request of its own, which shares the blocks of the prompt that it had in common."""
        common = choice.request
        choices = self._choices[common]
        if choice is choices[0]:
            return
        choices.remove(choice)
        max_tokens = common.max_total_tokens - len(common.tokens)
        choice.request = self._request(common.tokens, max_tokens, common.salt, common.reuse_prefix, common.group)
        self._choices[choice.request] = [choice]
        self.scheduler.fork(common, choice.request)

    def _accept(self, turn: Turn, sampled: Sampled) -> None:
        """Adds what was sampled for a choice, up to its first wrong guess or its end."""
        choice, request = turn.choice, turn.choice.request
        if not turn.rows:
            self._end(choice, "length")
            return
        for row in range(turn.first, turn.first + turn.num_right(sampled) + 1):
            if choice.matcher is not None and choice.matcher.error:
                return self._end(choice, "error", choice.matcher.error)
            if row in sampled.errors:
                return self._end(choice, "error", str(sampled.errors[row]))
            if not sampled.finite[row]:
                where = f"position {len(request.tokens)} of request {choice.request_id}"
                return self._end(choice, "error", f"the logits at {where} are not finite or all excluded")
            token, logprob = sampled.tokens[row], None
            if choice.params.logprobs is not None:
                logprob = Logprob(token, sampled.logprobs[row], tuple(sampled.top[row]))
            self.scheduler.append(request, token)
            self._num_generated_tokens += 1
            event = choice.accept(token, logprob)
            self._events.append(event)
            if event.completion is not None:
                return self._close(choice)

    def _end(self, choice: Choice, finish_reason: FinishReason, error: str | None = None) -> None:
        """Ends a choice, unless it has ended already."""
        if choice in self._open.get(choice.request_id, ()):
            self._events.append(choice.end(finish_reason, error))
            self._close(choice)

    def _close(self, choice: Choice) -> None:
        """Gives back the blocks of a choice that has ended."""
        still_open = self._open[choice.request_id]
        still_open.remove(choice)
        if not still_open:
            del self._open[choice.request_id]
            if adapter := self._adapter_of.pop(choice.request_id, None):
                self.adapters.release(adapter)
        if choice.request in self._choices:
            del self._choices[choice.request]
            self.scheduler.finish(choice.request)
