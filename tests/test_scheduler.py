"""The scheduler against a model of the engine in which a slot of the cache holds the tokens that led to it.

`Simulation` plays engine and runner. Its memory maps each slot to a history: the salt and all tokens up to
that position, as one number. Keys and values are a function of the history and of nothing else, so a slice
is right exactly if every position that it attends to holds the history of its own request.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import llama.blocks
import llama.request
import llama.scheduler
from llama.blocks import BlockAllocator, PrefixCache, extents
from llama.request import Request, Slice, Status, Step
from llama.scheduler import RequestTooLarge, Scheduler, SchedulerStats


class Simulation:
    """Engine and runner around a scheduler, without a model; every step is checked from all sides."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.alive: list[Request] = []
        self.memory: dict[int, int] = {}  # slot -> history
        self.origins: dict[int, tuple[int | bytes, int]] = {}  # history -> (the one before or salt, token)
        self.lines: dict[Request, list[int]] = {}  # request -> the history of each of its tokens
        self.num_steps = 0
        self.is_sound = True  # no check has failed

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
        self.is_sound = False
        before = list(self.scheduler.running)
        step = self.scheduler.schedule()
        self.num_steps += 1
        self._check_order(step, before)
        self.scheduler.check()
        self._run(step)
        sampled = [part.request for part in step.slices if part.num_sampled]
        if meanwhile:
            meanwhile()
        self.scheduler.advance(step)
        self.check()
        for request in sampled:
            if request.status is Status.FINISHED:
                continue
            if len(request.tokens) < request.max_total_tokens:
                self.scheduler.append(request, self._sample(request))
            if len(request.tokens) == request.max_total_tokens:
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
        self.is_sound = False
        self.scheduler.check()
        self._check_cached_blocks()
        self.is_sound = True

    def _follow(self, request: Request) -> None:
        self.alive.append(request)
        self.lines[request] = []

    def _history(self, request: Request, position: int) -> int:
        line = self.lines[request]
        while len(line) <= position:
            before, token = line[-1] if line else request.salt, request.tokens[len(line)]
            start = before if line else int.from_bytes(request.salt)
            line.append((start * 1_000_003 + token + 1) % (2**61 - 1))
            assert self.origins.setdefault(line[-1], (before, token)) == (before, token)
        return line[position]

    def _sample(self, request: Request) -> int:
        """A function of the history alone, as greedy sampling is."""
        return self._history(request, len(request.tokens) - 1) % 7 % 3

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
        if hasattr(self, "simulation") and self.simulation.is_sound:
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
    monkeypatch.setattr(Scheduler, "_admit", lambda self, request: len(request.tokens) < 9 and admit(self, request))


FAULTS = {  # and the words of the check that catches each
    skips_the_decrement_on_abort: "references, . holders",
    counts_one_block_too_few: "list index out of range|without slots",
    forgets_the_salt: "reads another's keys|wrong salt",
    writes_to_shared_blocks: "reads another's keys|before it is computed|wrong tokens",
    forgets_to_order_the_copy: "reads another's keys",
    advertises_blocks_before_they_are_computed: "before it is computed",
    evicts_referenced_blocks: "evictable in 3",
    frees_shared_blocks_twice: "references, . holders",
    hashes_without_the_parent: "reads another's keys|wrong salt",
    believes_a_digest: "reads another's keys",
    resumes_a_preempted_request_where_it_was: "reads another's keys|computed without blocks",
    overruns_the_budget: "over the budget",
    takes_the_last_token_from_the_cache: "nothing to run|an empty or oversized slice",
    preempts_the_oldest: "an older request was preempted|does not move|an empty step",
    lets_the_newest_pass: "out of order|passed by another",
    stalls_while_others_wait: "an empty step while requests are left",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_machine_catches_a_scheduler_that(fault, monkeypatch):
    fault(monkeypatch)
    machine = settings(max_examples=100, stateful_step_count=50, phases=[Phase.generate], **REPEATABLE)
    with pytest.raises((AssertionError, IndexError), match=FAULTS[fault]):
        run_state_machine_as_test(SchedulerMachine, settings=machine)


# -- steps


def start(num_blocks: int = 64, block_size: int = 4, **options: object) -> Simulation:
    return Simulation(Scheduler(num_blocks, block_size, **options))


def shape(step: Step) -> list[tuple[int, int, int]]:
    return [(part.request.id, part.start, part.count) for part in step.slices]


def numbers(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def test_decoding_and_pieces_of_prompts_share_a_step():
    simulation = start(block_size=16, max_step_tokens=40)
    simulation.add(numbers(40, 1), 5)
    assert shape(simulation.step()) == [(0, 0, 40)]
    simulation.add(numbers(45, 2), 5)
    simulation.add(numbers(9, 3), 5)
    assert shape(simulation.step()) == [(0, 40, 1), (1, 0, 39)]
    assert shape(simulation.step()) == [(0, 41, 1), (1, 39, 6), (2, 0, 9)]
    assert shape(simulation.step()) == [(0, 42, 1), (1, 45, 1), (2, 9, 1)]


def test_a_chunk_limits_every_slice():
    simulation = start(max_step_tokens=40, chunk=16)
    simulation.add(numbers(40, 1), 2)
    simulation.add(numbers(20, 2), 2)
    assert shape(simulation.step()) == [(0, 0, 16), (1, 0, 16)]
    assert shape(simulation.step()) == [(0, 16, 16), (1, 16, 4)]
    assert shape(simulation.step()) == [(0, 32, 8), (1, 20, 1)]


def test_only_the_slice_that_ends_a_request_samples():
    simulation = start(max_step_tokens=6)
    request = simulation.add(numbers(8), 2)
    assert [part.num_sampled for part in simulation.scheduler.schedule().slices] == [0]
    assert Slice(request, 6, request.tokens[6:8]).num_sampled == 1
    assert Slice(request, 6, request.tokens[6:7]).num_sampled == 0
    assert Slice(request, 6, [*request.tokens[6:8], 1, 2]).num_sampled == 3  # behind each guess too


def test_a_prompt_never_holds_up_decoding_even_when_it_came_first():
    simulation = start(max_step_tokens=8, prefix_caching=False)
    simulation.add(numbers(20), 20)
    for n in range(3):
        simulation.add([n], 20)
    for _ in range(3):
        simulation.step()
    simulation.scheduler.preempt(simulation.alive[0])
    assert shape(simulation.step()) == [(1, 1, 1), (2, 1, 1), (3, 1, 1), (0, 0, 5)]
    assert shape(simulation.step()) == [(0, 5, 5), (1, 2, 1), (2, 2, 1), (3, 2, 1)]


def test_a_step_smaller_than_the_number_of_decoding_requests_serves_the_oldest():
    simulation = start(max_step_tokens=3)
    requests = [simulation.add([n], 4) for n in range(5)]
    simulation.step()
    assert [part.request for part in simulation.step().slices] == requests[:3]
    simulation.drain()


def test_a_one_token_request_beside_eight_longest_prompts_starts_in_time():
    simulation = start(num_blocks=8 * 256, block_size=4, max_step_tokens=64)
    for seed in range(8):
        simulation.add(numbers(1000, seed), 24)
    short = simulation.add([1], 1)
    while not short.num_computed_tokens:
        simulation.step()
    assert simulation.num_steps <= 2 * 64


def test_with_a_chunk_a_short_request_runs_beside_the_first_pieces_of_long_prompts():
    simulation = start(num_blocks=8 * 256, block_size=4, max_step_tokens=64, chunk=7)
    for seed in range(8):
        simulation.add(numbers(1000, seed), 24)
    short = simulation.add([1], 1)
    simulation.step()
    assert short.num_computed_tokens == 1


def test_no_more_than_max_running_requests_run():
    simulation = start(max_running=2)
    for n in range(4):
        simulation.add([n], 3)
    simulation.step()
    stats = simulation.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 2)
    simulation.drain()


def test_nobody_passes_a_waiting_request_that_is_too_large_for_now():
    simulation = start(num_blocks=8)
    simulation.add(numbers(16, 1), 4)
    simulation.step()
    large, small = simulation.add(numbers(20, 2), 4), simulation.add([1], 1)
    simulation.step()
    assert (large.status, small.status) == (Status.WAITING, Status.WAITING)
    simulation.drain()


def test_the_youngest_request_is_preempted_when_the_pool_is_full_and_still_finishes():
    simulation = start(num_blocks=5, prefix_caching=False)
    older, younger = simulation.add(numbers(8, 1), 12), simulation.add(numbers(4, 2), 12)
    while not younger.num_preemptions:
        simulation.step()
    assert (older.status, younger.status, younger.num_computed_tokens) == (Status.RUNNING, Status.WAITING, 0)
    simulation.drain()
    assert older.num_preemptions == 0
    assert len(younger.tokens) == 16


def test_a_preempted_request_takes_its_old_place_and_finds_its_cached_blocks():
    simulation = start(num_blocks=16)
    first, second = simulation.add(numbers(10, 1), 5), simulation.add(numbers(10, 2), 5)
    simulation.step()
    simulation.scheduler.preempt(first)
    simulation.scheduler.preempt(second)
    assert simulation.scheduler.waiting == [first, second]
    assert shape(simulation.step()) == [(0, 8, 3), (1, 8, 3)]
    assert (first.num_preemptions, first.num_cached_tokens) == (1, 0)
    stats = simulation.scheduler.stats()
    assert (stats.num_preemptions, stats.num_queried_tokens, stats.num_hit_tokens) == (2, 20, 0)


def test_outputs_do_not_change_when_requests_are_preempted_at_every_other_step():
    def outputs(preempting: bool) -> tuple[list[list[int]], int]:
        rng = random.Random(7)
        simulation = start(num_blocks=40, block_size=16, max_running=16)
        prompts = [numbers(40)[: rng.choice([0, 33])] + numbers(rng.randint(1, 60), n) for n in range(100)]
        requests = [simulation.add(prompt, rng.randint(10, 60)) for prompt in prompts]
        while simulation.alive:
            simulation.step()
            running = simulation.scheduler.running
            if preempting and running and rng.random() < 0.5:
                simulation.scheduler.preempt(rng.choice(running))
        assert simulation.scheduler.stats().num_referenced_blocks == 0
        return [request.tokens for request in requests], simulation.scheduler.stats().num_preemptions

    (calm, _), (disturbed, num_preemptions) = outputs(False), outputs(True)
    assert num_preemptions >= 200
    assert disturbed == calm


def test_the_same_calls_give_the_same_steps():
    def trace() -> list:
        rng = random.Random(3)
        simulation = start(num_blocks=12, max_step_tokens=10)
        steps = []
        for _ in range(200):
            if len(simulation.alive) < 5:
                simulation.add(STORY[: rng.randint(1, 20)], rng.randint(1, 20))
            step = simulation.step()
            steps.append((shape(step), step.copies, [part.request.blocks[:] for part in step.slices]))
        return steps

    assert trace() == trace()


def test_an_idle_scheduler_gives_empty_steps():
    scheduler = Scheduler(4)
    assert scheduler.schedule() == scheduler.schedule() == Step(())
    scheduler.advance(scheduler.schedule())


def test_a_step_is_of_512_tokens_for_256_requests_unless_told_otherwise():
    scheduler = Scheduler(4)
    sizes = (scheduler.block_size, scheduler.max_step_tokens, scheduler.chunk, scheduler.max_running)
    assert (*sizes, scheduler.prefix_caching, scheduler.prefixes.digest_size) == (16, 512, 512, 256, True, 32)


# -- what is refused


def test_a_request_that_can_never_fit_is_refused_at_once():
    scheduler = Scheduler(4, 16)
    scheduler.add(Request(0, [1], 64))
    advice = "shorten it, lower max_tokens or raise kv_cache_memory"
    with pytest.raises(RequestTooLarge, match=f"^request 1 may grow to 65 tokens, the cache holds 64: {advice}$"):
        scheduler.add(Request(1, [1], 65))
    assert scheduler.stats().num_waiting == 1


@pytest.mark.parametrize(
    ("tokens", "most", "message"),
    [
        ([], 5, "request 7 has 0 tokens: give it 1 to max_total_tokens = 5"),
        ([1, 2], 1, "request 7 has 2 tokens: give it 1 to max_total_tokens = 1"),
    ],
)
def test_a_request_without_room_for_its_own_tokens_is_refused(tokens, most, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Scheduler(4).add(Request(7, tokens, most))


def test_a_request_is_added_once():
    scheduler, request = Scheduler(4), Request(7, [1], 2)
    scheduler.add(request)
    with pytest.raises(ValueError, match=r"^request 7 is waiting: a request is added once$"):
        scheduler.add(request)


def test_a_request_is_finished_once():
    scheduler, request = Scheduler(4), Request(7, [1], 2)
    with pytest.raises(ValueError, match=r"^request 7 is new: there is nothing to finish$"):
        scheduler.finish(request)
    scheduler.add(request)
    scheduler.finish(request)
    with pytest.raises(ValueError, match=r"^request 7 is finished: there is nothing to finish$"):
        scheduler.finish(request)


def test_only_a_running_request_is_preempted():
    scheduler, request = Scheduler(4), Request(7, [1], 2)
    scheduler.add(request)
    with pytest.raises(ValueError, match=r"^request 7 is waiting: there is nothing to preempt$"):
        scheduler.preempt(request)


@pytest.mark.parametrize(("tokens", "salt"), [([1, 2, 4], b""), ([1, 2], b""), ([1, 2, 3], b"a")])
def test_a_child_must_begin_with_what_its_parent_has_computed(tokens, salt):
    simulation = start()
    parent = simulation.add([1, 2, 3], 4)
    simulation.step()
    with pytest.raises(ValueError, match=r"^request 9 cannot share with 0: other tokens or salt$"):
        simulation.scheduler.fork(parent, Request(9, tokens, 9, salt))


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_step_tokens", "max_running", "chunk"])
def test_every_size_is_at_least_one(name):
    with pytest.raises(ValueError, match=f"^{name} is 0: it must be at least 1$"):
        Scheduler(**{"num_blocks": 4, name: 0})


def test_a_block_freed_twice_raises():
    allocator = BlockAllocator(4, PrefixCache(4))
    blocks: list[int] = []
    allocator.allocate(blocks, 2, 2)
    allocator.free(blocks)
    with pytest.raises(ValueError, match=r"^block 1 is freed twice$"):
        allocator.free(blocks)


def test_misuse_by_the_engine_is_noticed():
    simulation = start()
    scheduler, request = simulation.scheduler, simulation.add([1, 2], 1)
    step = scheduler.schedule()
    with pytest.raises(AssertionError, match="the last step has not been advanced"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="a request is forked between steps"):
        scheduler.fork(request, Request(1, [1, 2], 3))
    with pytest.raises(AssertionError, match="only the last scheduled step is advanced, and once"):
        scheduler.advance(Step(step.slices))
    scheduler.advance(step)
    with pytest.raises(AssertionError, match="request 0 has nothing to run: append its token or finish it"):
        scheduler.schedule()
    scheduler.append(request, 3)
    with pytest.raises(AssertionError, match="request 0 has all its tokens"):
        scheduler.append(request, 3)
    scheduler.finish(request)
    with pytest.raises(AssertionError, match="request 0 is not under way"):
        scheduler.append(request, 3)


# -- ends


@pytest.mark.parametrize(("num_steps", "num_cached_blocks"), [(0, 0), (1, 1), (2, 2), (4, 3), (7, 6)])
def test_an_abort_at_any_moment_gives_every_block_back(num_steps, num_cached_blocks):
    simulation = start(max_step_tokens=4)
    requests = [simulation.add(numbers(12, 1), 9), simulation.add(numbers(9, 2), 9)]
    for _ in range(num_steps):
        simulation.step()
    for request in requests:
        simulation.finish(request)
        simulation.check()
    stats = simulation.scheduler.stats()
    assert stats == SchedulerStats(
        num_running=0,
        num_waiting=0,
        num_blocks=64,
        num_referenced_blocks=0,
        num_cached_blocks=num_cached_blocks,
        num_preemptions=0,
        num_queried_tokens=stats.num_queried_tokens,
        num_hit_tokens=0,
    )


def test_a_request_finished_during_its_step_is_not_advanced():
    simulation = start()
    request = simulation.add(numbers(8), 4)
    simulation.step(meanwhile=lambda: simulation.finish(request))
    assert simulation.scheduler.stats().num_cached_blocks == 0
    simulation.drain()


def test_a_token_sampled_for_a_request_that_was_preempted_meanwhile_is_kept():
    simulation = start()
    request = simulation.add(numbers(8), 4)
    simulation.step(meanwhile=lambda: simulation.scheduler.preempt(request))
    assert (request.status, len(request.tokens), request.num_computed_tokens) == (Status.WAITING, 9, 0)
    simulation.drain()
    assert len(request.tokens) == 12


# -- cached prefixes


def run_alone(simulation: Simulation, tokens: list[int], num_generated: int = 1, **options) -> Request:
    request = simulation.add(tokens, num_generated, **options)
    simulation.drain()
    return request


def test_a_repeated_prompt_computes_only_its_last_block():
    simulation = start()
    assert run_alone(simulation, numbers(22)).num_cached_tokens == 0
    assert run_alone(simulation, numbers(22)).num_cached_tokens == 20
    assert run_alone(simulation, [*numbers(22)[:13], 5, 6, 7, 8, 9]).num_cached_tokens == 12


def test_what_is_forgotten_is_not_found_again_and_what_is_at_work_stays():
    simulation = start()
    run_alone(simulation, numbers(22))
    simulation.scheduler.forget_prefixes()
    simulation.scheduler.check()
    assert simulation.scheduler.stats().num_cached_blocks == 0
    assert run_alone(simulation, numbers(22)).num_cached_tokens == 0
    assert run_alone(simulation, numbers(22)).num_cached_tokens == 20


def test_at_least_the_last_prompt_token_is_computed():
    simulation = start()
    run_alone(simulation, numbers(20), 8)
    assert run_alone(simulation, numbers(20)).num_cached_tokens == 16
    assert run_alone(simulation, [*numbers(21)[:20], 0]).num_cached_tokens == 20


def test_the_next_turn_of_a_chat_finds_what_was_generated():
    simulation = start()
    turn = run_alone(simulation, numbers(10), 11)
    assert len(turn.tokens) == 21
    assert run_alone(simulation, [*turn.tokens, *numbers(6, 2)]).num_cached_tokens == 20


def test_another_salt_shares_nothing():
    simulation = start()
    first = simulation.add(numbers(20), 4, salt=b"one")
    simulation.step()
    second = simulation.add(numbers(20), 4, salt=b"two")
    third = simulation.add(numbers(20), 4, salt=b"one")
    simulation.step()
    assert (second.num_cached_tokens, third.num_cached_tokens) == (0, 16)
    assert not set(first.blocks) & set(second.blocks)
    assert first.blocks[:4] == third.blocks[:4]


def test_a_request_that_wants_every_prompt_token_computed_reuses_nothing_but_can_be_reused():
    simulation = start()
    run_alone(simulation, numbers(20))
    assert run_alone(simulation, numbers(20), reuse_prefix=False).num_cached_tokens == 0
    simulation = start()
    run_alone(simulation, numbers(20), reuse_prefix=False)
    assert run_alone(simulation, numbers(20)).num_cached_tokens == 16
    stats = simulation.scheduler.stats()
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (20, 16)  # the first was not looked up


def test_without_prefix_caching_nothing_is_kept_or_hashed(monkeypatch):
    monkeypatch.setattr(llama.blocks, "sha256", None)
    simulation = start(prefix_caching=False)
    run_alone(simulation, numbers(20))
    assert run_alone(simulation, numbers(20)).num_cached_tokens == 0
    assert simulation.scheduler.stats().num_cached_blocks == 0


def test_a_block_is_found_only_after_its_step_has_run():
    simulation = start(max_step_tokens=64)
    first, second = simulation.add(numbers(20), 4), simulation.add(numbers(20), 4)
    simulation.step()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    assert not set(first.blocks) & set(second.blocks)
    assert simulation.add(numbers(20), 4).num_cached_tokens == 0
    simulation.step()
    assert simulation.alive[2].num_cached_tokens == 16


def test_every_block_is_hashed_once_however_often_the_request_is_looked_at(monkeypatch):
    hashed = []

    def counting(data: bytes):
        hashed.append(data)
        return sha256(data)

    monkeypatch.setattr(llama.blocks, "sha256", counting)
    simulation = start(num_blocks=12, max_step_tokens=5)
    simulation.add(numbers(16, 1), 16, salt=b"a")
    simulation.step()
    second = simulation.add(numbers(16, 2), 16, salt=b"b")  # looked up at every step until it fits
    for _ in range(6):
        simulation.step()
        if second.status is Status.RUNNING:
            simulation.scheduler.preempt(second)
    simulation.drain()
    num_full_blocks = 2 * (31 // 4)  # of each request all tokens but the last are computed
    assert len(hashed) == num_full_blocks + 2  # and the salts
    assert len(set(hashed)) == len(hashed)


@pytest.mark.parametrize("digest_size", [0, 1])
def test_colliding_digests_cost_hits_but_never_share_wrong_blocks(digest_size):
    simulation = start(num_blocks=400, digest_size=digest_size)
    rng = random.Random(5)
    for _ in range(60):
        run_alone(simulation, [rng.randrange(2) for _ in range(24)], salt=rng.choice([b"a", b"b"]))
    hit = run_alone(simulation, numbers(8))
    assert hit.num_cached_tokens == 0


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_in_a_large_pool_exactly_the_longest_common_prefix_is_found(block_size):
    """Against the slow twin: all sequences computed so far, compared token by token."""
    simulation = start(num_blocks=2400 // block_size, block_size=block_size)
    rng = random.Random(block_size)
    computed: list[tuple[bytes, list[int]]] = []
    for _ in range(30):
        tokens = STORY[: rng.randint(0, 20)] * 3 + [rng.randrange(3) for _ in range(rng.randint(1, 9))]
        salt = rng.choice([b"a", b"b"])
        longest = 0
        for other_salt, other in computed:
            while salt == other_salt and longest < len(other) and tokens[: longest + 1] == other[: longest + 1]:
                longest += 1
        request = run_alone(simulation, tokens, rng.randint(1, 9), salt=salt)
        assert request.num_cached_tokens == min(longest, len(tokens) - 1) // block_size * block_size
        computed.append((salt, request.tokens[:-1]))


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end():
    simulation = start(num_blocks=12)
    one, two = numbers(17, 1), numbers(17, 2)
    run_alone(simulation, one)
    run_alone(simulation, two)
    run_alone(simulation, one)  # now the second is the least recently used
    run_alone(simulation, numbers(20, 3))  # 6 blocks where 4 are empty
    assert len(simulation.scheduler.prefixes.match(Request(0, one, 20))) == 4
    assert len(simulation.scheduler.prefixes.match(Request(0, two, 20))) == 2


# -- forks


def test_children_share_the_blocks_and_whoever_writes_first_copies():
    simulation = start()
    parent = simulation.add(numbers(10), 8)
    simulation.step()
    child = simulation.fork(parent, [], 8)
    assert child.blocks == parent.blocks
    assert (child.num_computed_tokens, child.num_prompt_tokens) == (10, 10)
    shared = parent.blocks[-1]
    step = simulation.step()
    assert step.copies == ((shared, parent.blocks[-1]),)
    assert child.blocks[-1] == shared != parent.blocks[-1]
    assert child.blocks[:2] == parent.blocks[:2]
    assert simulation.step().copies == ()
    simulation.drain()


def test_a_child_waits_where_no_seat_is_free_and_finds_the_prompt_cached():
    simulation = start(max_running=1)
    parent = simulation.add(numbers(10), 3)
    simulation.step()
    child = simulation.fork(parent, [], 3)
    assert (child.status, child.blocks) == (Status.WAITING, [])
    simulation.drain()
    assert child.num_cached_tokens == 8


def test_a_child_of_an_unfinished_prompt_waits_in_its_parents_place():
    simulation = start(max_step_tokens=3)
    parent = simulation.add(numbers(5), 3)
    later = simulation.add([1], 3)
    simulation.step()
    child = simulation.fork(parent, numbers(5)[3:], 3)
    assert simulation.scheduler.waiting == [child, later]
    simulation.drain()


def test_a_child_is_refused_for_the_same_reasons_as_any_request():
    simulation = start(num_blocks=4)
    parent = simulation.add(numbers(5), 3)
    simulation.step()
    with pytest.raises(RequestTooLarge, match=r"^request 1 may grow to 17 tokens, the cache holds 16: "):
        simulation.fork(parent, [1], 11)
    child = simulation.fork(parent, [1], 1)
    with pytest.raises(ValueError, match=r"^request 1 is running: a request is added once$"):
        simulation.scheduler.fork(parent, child)


# -- where blocks lie


def test_requests_that_grow_side_by_side_have_one_extent_each():
    simulation = start(num_blocks=4096, block_size=1)
    requests = []
    for n in range(32):
        requests.append(simulation.add([n], 50))
        simulation.step()
    for _ in range(15):
        simulation.step()
        assert [len(request.extents) for request in requests] == [1] * 32
    assert [len(request.blocks) for request in requests] == list(range(47, 15, -1))


def test_requests_that_may_grow_larger_than_the_pool_still_get_equal_room():
    simulation = start(num_blocks=1024, block_size=1)
    requests = [simulation.add([n], 1000) for n in range(32)]
    for _ in range(30):
        simulation.step()
    assert [len(request.extents) for request in requests] == [1] * 32


def test_in_a_pool_full_of_cached_blocks_new_requests_still_lie_together():
    simulation = start(num_blocks=600, block_size=1)
    for n in range(40):
        run_alone(simulation, numbers(20, n), 10)
    assert simulation.scheduler.stats().num_cached_blocks > 560
    requests = [simulation.add(numbers(20, 100 + n), 15) for n in range(8)]
    for _ in range(14):
        simulation.step()
    assert sum(len(request.extents) for request in requests) <= 2 * 8


def test_a_pool_is_used_to_its_last_block_and_who_gets_none_pauses_before_anyone_is_preempted():
    simulation = start(num_blocks=5, block_size=1, prefix_caching=False)
    first, second = simulation.add([1], 3), simulation.add([2], 3)
    simulation.step()
    simulation.step()
    assert shape(simulation.scheduler.schedule()) == [(0, 2, 1)]
    assert sorted(first.blocks + second.blocks) == list(range(5))
    assert simulation.scheduler.stats().num_preemptions == 0


def test_room_is_promised_as_far_as_it_was_asked_for():
    allocator = BlockAllocator(8, PrefixCache(4))
    first: list[int] = []
    allocator.allocate(first, 2, 4)
    second: list[int] = []
    allocator.allocate(second, 1, 1)
    assert (first, second) == ([0, 1], [4])


def test_promised_room_is_given_to_others_before_anyone_is_preempted():
    allocator = BlockAllocator(8, PrefixCache(4))
    first: list[int] = []
    allocator.allocate(first, 1, 8)
    second: list[int] = []
    allocator.allocate(second, 1, 8)
    third: list[int] = []
    allocator.allocate(third, 6, 6)
    assert (first, second) == ([0], [4])
    assert sorted(first + second + third) == list(range(8))
    for blocks in (first, second, third):
        allocator.free(blocks)
    fourth: list[int] = []
    allocator.allocate(fourth, 8, 8)
    assert fourth == list(range(8))


def test_who_takes_from_promised_room_leaves_the_rest_free():
    allocator = BlockAllocator(8, PrefixCache(4))
    first: list[int] = []
    allocator.allocate(first, 1, 8)
    second: list[int] = []
    allocator.allocate(second, 1, 1)
    assert (first, second) == ([0], [4])
    third: list[int] = []
    allocator.allocate(third, 3, 3)
    assert third == [5, 6, 7]
    allocator.check(Counter(first + second + third))


@given(st.lists(st.integers(0, 8)))
def test_extents_spell_out_the_same_blocks_in_the_fewest_runs(blocks):
    runs = extents(blocks)
    assert [block for first, count in runs for block in range(first, first + count)] == blocks
    assert all(a + n != b for (a, n), (b, _) in pairwise(runs))


@pytest.mark.parametrize("module", [llama.request, llama.blocks, llama.scheduler], ids=lambda module: module.__name__)
def test_the_scheduler_needs_nothing_but_the_standard_library(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    own = {"llama.request", "llama.blocks"}
    assert {name.split(".")[0] for name in names - own} <= sys.stdlib_module_names


# ---- guesses


def decoding(num_requests: int, num_tokens: int = 16, **options) -> tuple[Scheduler, list[Request]]:
    """A scheduler whose requests have computed all but their last token, which stands in a block of its own."""
    scheduler = Scheduler(**{"num_blocks": 16, "block_size": 4, **options})
    requests = [Request(i, [7 * i + j for j in range(4)], num_tokens) for i in range(num_requests)]
    for request in requests:
        scheduler.add(request)
    while any(request.num_computed_tokens < 4 for request in requests):
        scheduler.advance(scheduler.schedule())
    for request in requests:
        scheduler.append(request, 99)
    scheduler.schedule()
    return scheduler, requests


def test_guesses_get_slots_behind_a_request_s_own():
    scheduler, [request] = decoding(1)
    assert scheduler.make_room({request: 7}) == {request: 7}
    step = scheduler.widen({request: [1, 2, 3]})
    assert [part.tokens for part in step.slices] == [[99, 1, 2, 3]]
    scheduler.check()
    scheduler.advance(step, [2])
    assert request.num_computed_tokens == 6
    for token in (1, 8):
        scheduler.append(request, token)
    scheduler.check()


def test_guesses_end_one_before_what_a_request_may_reach():
    scheduler, [request] = decoding(1, num_tokens=8)
    assert scheduler.make_room({request: 7}) == {request: 2}
    scheduler, [request] = decoding(1, num_tokens=6)
    assert scheduler.make_room({request: 7}) == {}


def test_guesses_get_what_the_budget_leaves_over():
    scheduler, (first, second) = decoding(2, max_step_tokens=8)
    assert scheduler.make_room({first: 4, second: 7}) == {first: 4, second: 2}
    scheduler, (first, second) = decoding(2, chunk=4)
    assert scheduler.make_room({first: 7, second: 7}) == {first: 3, second: 3}


def test_nobody_is_preempted_for_guesses_and_everybody_could_still_grow():
    scheduler, (first, second) = decoding(2, num_blocks=7)
    assert scheduler.allocator.num_available == 3
    assert scheduler.make_room({first: 7, second: 7}) == {first: 7, second: 3}  # one block more, and two are left
    assert scheduler.allocator.num_available == 2
    scheduler.check()


def test_what_right_guesses_filled_is_found_when_the_request_has_ended():
    scheduler, [request] = decoding(1)
    scheduler.make_room({request: 7})
    scheduler.advance(scheduler.widen({request: [1, 2, 3]}), [4])
    for token in (1, 2, 3, 4):
        scheduler.append(request, token)
    scheduler.finish(request)
    later = Request(9, [*request.tokens, 5], 16)
    scheduler.add(later)
    scheduler.schedule()
    assert later.num_cached_tokens == 8
    scheduler.check()
