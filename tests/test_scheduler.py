"""The scheduler against a model of the engine in which a slot of the cache holds the tokens that led to it.

`Simulation` plays engine and runner. Its memory maps each slot to a history: the salt and all tokens up to
that position, as one number. Keys and values are a function of the history and of nothing else, so a slice
is right exactly if every position that it attends to holds the history of its own request.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llama.scheduler import (
    Request,
    Scheduler,
    Status,
    Step,
)


class Simulation:
    """Engine and runner around a scheduler, without a model; every step is checked from all sides."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.alive: list[Request] = []
        self.memory: dict[int, int] = {}  # slot -> history
        self.histories: dict[tuple[int | bytes, int], int] = {}  # (parent history or salt, token) -> history
        self.origins: list[tuple[int | bytes, int]] = []  # the same backwards
        self.lines: dict[Request, list[int]] = {}  # request -> the history of each of its tokens
        self.num_steps = 0

    def add(self, tokens: list[int], num_generated: int, **options: object) -> Request:
        request = Request(len(self.lines), list(tokens), len(tokens) + num_generated, **options)
        self.scheduler.add(request)
        self._follow(request)
        return request

    def fork(self, parent: Request, tokens: list[int], num_generated: int) -> Request:
        """A child with the parent's computed tokens and `tokens`, which may be none: then one is sampled."""
        shared = parent.tokens[: parent.num_computed_tokens]
        child = Request(len(self.lines), shared + tokens, len(shared + tokens) + num_generated, parent.salt)
        self.scheduler.fork(parent, child)
        self._follow(child)
        if not tokens:
            self.scheduler.append(child, self._sample(child))
        return child

    def finish(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.alive.remove(request)

    def step(self, meanwhile: Callable[[], None] | None = None) -> Step:
        """One step of the engine; `meanwhile` happens between the run and advance."""
        before = list(self.scheduler.running)
        step = self.scheduler.schedule()
        self.num_steps += 1
        self._check_order(step, before)
        self.scheduler.check()
        self._run(step)
        sampled = [part.request for part in step.slices if part.samples]
        if meanwhile:
            meanwhile()
        self.scheduler.advance(step)
        self.check()
        for request in sampled:
            if request.status is Status.FINISHED:
                continue
            if len(request.tokens) < request.max_total_tokens:
                self.scheduler.append(request, self._sample(request))
            else:
                self.finish(request)
        return step

    def drain(self) -> None:
        """Run until nobody is left. The first running request always moves, which bounds the steps."""
        most = self.num_steps + sum(r.max_total_tokens + 2 for r in self.alive)
        while self.alive:
            self.step()
            assert self.num_steps <= most, f"{len(self.alive)} requests are starving"
        step = self.scheduler.schedule()
        assert step == Step(())
        self.scheduler.advance(step)
        assert self.scheduler.stats().num_referenced_blocks == 0

    def check(self) -> None:
        self.scheduler.check()
        self._check_cached_blocks()

    def _follow(self, request: Request) -> None:
        self.alive.append(request)
        self.lines[request] = []

    def _history(self, request: Request, position: int) -> int:
        line = self.lines[request]
        while len(line) <= position:
            origin = (line[-1] if line else request.salt, request.tokens[len(line)])
            if origin not in self.histories:
                self.histories[origin] = len(self.origins)
                self.origins.append(origin)
            line.append(self.histories[origin])
        return line[position]

    def _sample(self, request: Request) -> int:
        """A function of the history alone, as greedy sampling is."""
        return self._history(request, len(request.tokens) - 1) * 7919 // 5 % 3

    def _slots(self, blocks: list[int], start: int, end: int) -> list[int]:
        size = self.scheduler.block_size
        return [blocks[p // size] * size + p % size for p in range(start, end)]

    def _run(self, step: Step) -> None:
        """All writes of a step come before its reads, as the keys of a packed step do in every layer."""
        size = self.scheduler.block_size
        for source, destination in step.copies:
            for offset in range(size):
                self.memory[destination * size + offset] = self.memory.get(source * size + offset, -1)
        for part in step.slices:
            end = part.start + part.count
            for position, slot in enumerate(self._slots(part.request.blocks, part.start, end), part.start):
                self.memory[slot] = self._history(part.request, position)
        for part in step.slices:
            end = part.start + part.count
            self._history(part.request, end - 1)
            found = [self.memory.get(slot) for slot in self._slots(part.request.blocks, 0, end)]
            assert found == self.lines[part.request][:end], f"request {part.request.id} reads another's keys"

    def _check_order(self, step: Step, before: list[Request]) -> None:
        scheduler = self.scheduler
        requests = [part.request for part in step.slices]
        assert bool(step.slices) == bool(self.alive), "an empty step while requests are left"
        assert len(set(requests)) == len(requests), "a request has two slices"
        assert sum(part.count for part in step.slices) <= scheduler.max_step_tokens, "over the budget"
        if before:
            assert requests[0] is before[0], "the first running request does not move"
        admitted = [request for request in scheduler.running if request not in before]
        preempted = [request for request in before if request not in scheduler.running]
        for request in scheduler.waiting:
            assert all(a.arrival <= request.arrival for a in admitted), "a request has been passed by another"
        for request in preempted:
            stayed = [r for r in before if r in scheduler.running]
            assert all(r.arrival <= request.arrival for r in stayed), "an older request was preempted"

    def _check_cached_blocks(self) -> None:
        """Every advertised block holds what it is advertised as, down to its salt."""
        size = self.scheduler.block_size
        for block, entry in self.scheduler.prefixes.blocks.items():
            held = [self.memory.get(block * size + offset) for offset in range(size)]
            assert None not in held, f"block {block} is advertised before it is written"
            tokens = memoryview(entry.tokens).cast("q").tolist()
            assert [self.origins[history][1] for history in held] == tokens, f"block {block}: wrong tokens"
            parents = [self.origins[history][0] for history in held]
            assert parents[1:] == held[:-1], f"block {block}: not one sequence"
            if isinstance(entry.parent, bytes):
                assert parents[0] == entry.parent, f"block {block}: wrong salt"
            elif self.scheduler.prefixes.blocks.get(entry.parent.block) is entry.parent:
                last = entry.parent.block * size + size - 1
                assert parents[0] == self.memory[last], f"block {block}: does not follow its parent"


# -- the state machine

STORY = [0, 1, 2, 0, 0, 1, 2, 2, 1, 0, 1, 1, 2, 0, 2, 1, 0, 0, 2, 1]  # prompts are its beginnings, and a tail
picks = st.integers(0, 31)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of everything that may happen to a scheduler, in a pool that is nearly always too small."""

    @initialize(
        num_blocks=st.integers(3, 16),
        block_size=st.sampled_from([1, 2, 3, 4]),
        max_step_tokens=st.integers(1, 16),
        max_running=st.integers(1, 6),
        chunk=st.sampled_from([None, None, 1, 3]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        digest_size=st.sampled_from([32, 32, 1, 0]),
    )
    def start(self, **sizes):
        self.simulation = Simulation(Scheduler(**sizes))
        self.capacity = sizes["num_blocks"] * sizes["block_size"]

    def pick(self, number: int, requests: list[Request]) -> Request:
        return requests[number % len(requests)]

    @precondition(lambda self: len(self.simulation.alive) < 8)
    @rule(
        begin=st.integers(0, len(STORY)),
        tails=st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=3),
        num_generated=st.integers(0, 30),
        salt=st.sampled_from([b"", b"", b"", b"a"]),
        reuse_prefix=st.sampled_from([True, True, True, False]),
    )
    def add(self, begin, tails, num_generated, salt, reuse_prefix):
        for tail in tails:
            tokens = (STORY[:begin] + tail)[: self.capacity] or [0]
            most = min(num_generated, self.capacity - len(tokens))
            self.simulation.add(tokens, most, salt=salt, reuse_prefix=reuse_prefix)

    @precondition(lambda self: self.simulation.alive)
    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.simulation.step()

    @precondition(lambda self: self.simulation.alive)
    @rule(number=picks, during_a_step=st.booleans())
    def abort(self, number, during_a_step):
        victim = self.pick(number, self.simulation.alive)
        if during_a_step:
            self.simulation.step(meanwhile=lambda: self.simulation.finish(victim))
        else:
            self.simulation.finish(victim)

    @precondition(lambda self: self.simulation.scheduler.running)
    @rule(number=picks, during_a_step=st.booleans())
    def preempt(self, number, during_a_step):
        scheduler = self.simulation.scheduler
        if during_a_step:
            self.simulation.step(meanwhile=lambda: scheduler.preempt(self.pick(number, scheduler.running)))
        else:
            scheduler.preempt(self.pick(number, scheduler.running))

    @precondition(lambda self: self.simulation.scheduler.running and len(self.simulation.alive) < 8)
    @rule(
        number=picks,
        tails=st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=3),
        num_generated=st.integers(1, 20),
    )
    def fork(self, number, tails, num_generated):
        parent = self.pick(number, self.simulation.scheduler.running)
        num_left = self.capacity - parent.num_computed_tokens
        for tail in tails:
            tail = tail[: max(num_left - 1, 0)]
            if num_left and parent.num_computed_tokens + len(tail):
                self.simulation.fork(parent, tail, min(num_generated, num_left - len(tail)))

    @invariant()
    def everything_is_consistent(self):
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.drain()


REPEATABLE = dict(
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def test_no_order_of_events_breaks_an_invariant():
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=100, stateful_step_count=50, **REPEATABLE)
    )


@pytest.mark.slow
def test_no_order_of_events_breaks_an_invariant_in_two_thousand_long_examples():
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=2000, stateful_step_count=100, **REPEATABLE)
    )


# -- seeded faults: each must be caught by the machine above


def skips_the_decrement_on_abort(monkeypatch):
    finish = Scheduler.finish

    def faulty(self, request):
        if request.status is Status.RUNNING and request.num_pending_tokens:
            request.blocks = []
        finish(self, request)

    monkeypatch.setattr(Scheduler, "finish", faulty)


def counts_one_block_too_few(monkeypatch):
    monkeypatch.setattr(Scheduler, "_num_blocks_for", lambda self, n: (n + self.block_size - 2) // self.block_size)


def forgets_the_salt(monkeypatch):
    key = PrefixCache._key

    def faulty(self, request, prefix):
        salt, request.salt = request.salt, b""
        try:
            return key(self, request, prefix)
        finally:
            request.salt = salt

    monkeypatch.setattr(PrefixCache, "_key", faulty)


def writes_to_shared_blocks(monkeypatch):
    monkeypatch.setattr(BlockAllocator, "is_writable", lambda self, block: True)


def forgets_to_order_the_copy(monkeypatch):
    schedule = Scheduler.schedule

    def faulty(self):
        self._step = dataclasses.replace(schedule(self), copies=())
        return self._step

    monkeypatch.setattr(Scheduler, "schedule", faulty)


def advertises_blocks_before_they_are_computed(monkeypatch):
    admit = Scheduler._admit

    def faulty(self, request):
        admitted = admit(self, request)
        if admitted:
            computed, request.num_computed_tokens = request.num_computed_tokens, len(request.tokens)
            self.prefixes.publish(request)
            request.num_computed_tokens = computed
        return admitted

    monkeypatch.setattr(Scheduler, "_admit", faulty)


def evicts_referenced_blocks(monkeypatch):
    share = BlockAllocator.share

    def faulty(self, blocks):
        revived = [block for block in blocks if block in self.evictable]
        share(self, blocks)
        self.evictable.update(dict.fromkeys(revived))

    monkeypatch.setattr(BlockAllocator, "share", faulty)


def frees_shared_blocks_twice(monkeypatch):
    free = BlockAllocator.free

    def faulty(self, blocks):
        free(self, blocks)
        free(self, [block for block in blocks if self.references[block]])

    monkeypatch.setattr(BlockAllocator, "free", faulty)


def hashes_without_the_parent(monkeypatch):
    key = PrefixCache._key

    def faulty(self, request, prefix):
        tokens = key(self, request, prefix)[2]
        return sha256(request.salt + tokens).digest(), request.salt, tokens

    monkeypatch.setattr(PrefixCache, "_key", faulty)


def believes_a_digest(monkeypatch):
    def faulty(self, request):
        found = []
        while len(found) < (len(request.tokens) - 1) // self.block_size:
            entry = self._by_digest.get(self._key(request, found)[0])
            if entry is None:
                break
            found.append(entry)
        return found

    monkeypatch.setattr(PrefixCache, "match", faulty)


def resumes_a_preempted_request_where_it_was(monkeypatch):
    admit = Scheduler._admit

    def faulty(self, request):
        admitted = admit(self, request)
        if admitted and request.num_preemptions:
            request.num_computed_tokens = len(request.tokens) - 1
        return admitted

    monkeypatch.setattr(Scheduler, "_admit", faulty)


def overruns_the_budget(monkeypatch):
    schedule = Scheduler.schedule

    def faulty(self):
        self.max_step_tokens += 1
        try:
            return schedule(self)
        finally:
            self.max_step_tokens -= 1

    monkeypatch.setattr(Scheduler, "schedule", faulty)


def takes_the_last_token_from_the_cache(monkeypatch):
    match = PrefixCache.match

    def faulty(self, request):
        request.tokens.append(0)
        try:
            return match(self, request)
        finally:
            request.tokens.pop()

    monkeypatch.setattr(PrefixCache, "match", faulty)


def preempts_the_oldest(monkeypatch):
    preempt = Scheduler.preempt
    monkeypatch.setattr(Scheduler, "preempt", lambda self, request: preempt(self, self.running[0]))


def lets_the_newest_pass(monkeypatch):
    def faulty(self, request, status):
        request.status = status
        (self.running if status is Status.RUNNING else self.waiting).insert(0, request)

    monkeypatch.setattr(Scheduler, "_enqueue", faulty)


def stalls_while_others_wait(monkeypatch):
    admit = Scheduler._admit
    monkeypatch.setattr(
        Scheduler, "_admit", lambda self, request: len(request.tokens) < 9 and admit(self, request)
    )


FAULTS = [
    skips_the_decrement_on_abort,
    counts_one_block_too_few,
    forgets_the_salt,
    writes_to_shared_blocks,
    forgets_to_order_the_copy,
    advertises_blocks_before_they_are_computed,
    evicts_referenced_blocks,
    frees_shared_blocks_twice,
    hashes_without_the_parent,
    believes_a_digest,
    resumes_a_preempted_request_where_it_was,
    overruns_the_budget,
    takes_the_last_token_from_the_cache,
    preempts_the_oldest,
    lets_the_newest_pass,
    stalls_while_others_wait,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_machine_catches_a_scheduler_that(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)) as caught:
        run_state_machine_as_test(
            SchedulerMachine,
            settings=settings(max_examples=100, stateful_step_count=50, phases=[Phase.generate], **REPEATABLE),
        )
    print(repr(caught.value))
