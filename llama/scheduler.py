"""Who runs next, and where its keys and values live. Plain Python: no tensor and no model in sight.

There are no phases. A request is a list of tokens of which the first `num_computed_tokens` have their keys
and values in the cache; the rest still has to run. A step gives each of some requests a slice of its rest.
Decoding is a slice of one token, a long prompt takes several slices (chunked prefill), and a prefix found
in the cache, or a preemption, only moves `num_computed_tokens`. With max_step_tokens = 8:

    request  tokens  computed      step                      computed after it
    A            41        40      A[40:41], which samples                  41
    B            30        16      B[16:22]                                 22
    C             9         0      C[0:1]                                    1

The cache is a pool of equal blocks: token p of a request lives in slot p % block_size of its block number
p // block_size. Blocks are handed out as a request grows, shared by count, copied before a shared one is
written, and kept after their last user for requests that begin with the same tokens (paged attention: Kwon
et al. 2023, arXiv:2309.06180; one budget for prompts and decoding: Agrawal et al. 2024, arXiv:2403.02310).

The life of a step: schedule() -> the runner copies blocks and runs the slices -> advance(step) -> for every
slice that samples: append(request, token), for each token, or finish(request). The same calls give the same steps.
Between schedule() and the runner, make_room() and widen() put guessed tokens behind those that a request has.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from llama.blocks import BlockAllocator, PrefixCache, extents
from llama.request import Request, Slice, Status, Step

MAX_RUNNING = 256  # requests at once, unless it is said


class RequestTooLarge(ValueError):
    """The request could not finish even if it had the whole cache to itself."""


@dataclass(frozen=True)
class SchedulerStats:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_referenced_blocks: int  # held by running requests
    num_cached_blocks: int  # held by nobody, kept for a later request; all other blocks are empty
    num_preemptions: int
    num_queried_tokens: int  # of prompts that were looked up among the cached blocks when they were let in
    num_hit_tokens: int  # of those, found there


class Scheduler:
    """Decides each step: first come first served, under a budget of tokens.

    Running requests come first, by arrival, each with as many of its pending tokens as the budget allows
    once every decoding request behind it has its one; so prompts never hold up decoding. The rest of the
    budget admits waiting requests, by arrival and none past another, each when all its tokens find blocks
    and one more is left for every running request. When the pool is full, the youngest running request
    gives up its blocks and waits again at its old place; what stayed cached it need not compute again. So
    the first of the running requests moves at every step, and nobody waits for ever.

    max_step_tokens: in all slices of a step; chunk: in one slice (None: no limit of its own).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        max_step_tokens: int = 512,
        max_running: int = MAX_RUNNING,
        prefix_caching: bool = True,
        *,
        chunk: int | None = None,
        digest_size: int = 32,
    ):
        chunk = max_step_tokens if chunk is None else chunk
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_step_tokens": max_step_tokens}
        for name, size in {**sizes, "max_running": max_running, "chunk": chunk}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: it must be at least 1")
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.max_running = max_running
        self.prefix_caching = prefix_caching
        self.chunk = chunk
        self.prefixes = PrefixCache(block_size, digest_size)
        self.allocator = BlockAllocator(num_blocks, self.prefixes)
        self.running: list[Request] = []  # by arrival, as are the waiting ones
        self.waiting: list[Request] = []
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._step = Step(())  # scheduled and not yet advanced

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a new request. RequestTooLarge if it could never fit, ValueError if it makes no sense."""
        self._accept(request)
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self._enqueue(request, Status.WAITING)

    def fork(self, parent: Request, child: Request) -> None:
        """Add a request that begins with what the parent has computed, and shares the blocks of that.

        It stands beside the parent in the order of service, and runs at once if max_running allows and the
        parent has left its prompt behind; else it waits and finds what is cached, as any other request.
        """
        assert not self._step.slices, "a request is forked between steps"
        shared = parent.num_computed_tokens
        if child.tokens[:shared] != parent.tokens[:shared] or child.salt != parent.salt:
            raise ValueError(f"request {child.id} cannot share with {parent.id}: other tokens or salt")
        self._accept(child)
        child.arrival = parent.arrival
        child.num_prompt_tokens = parent.num_prompt_tokens
        is_ready = parent.status is Status.RUNNING and parent.num_pending_tokens <= 1
        if not is_ready or not shared or len(self.running) >= self.max_running:
            self._enqueue(child, Status.WAITING)
            return
        child.num_computed_tokens = shared
        child.num_cached_tokens = parent.num_cached_tokens
        child.digests = parent.digests[: shared // self.block_size]
        child.prefix = parent.prefix[: shared // self.block_size]
        child.blocks = parent.blocks[: self._num_blocks_for(shared)]
        child.extents = extents(child.blocks)
        self.allocator.share(child.blocks)
        self._enqueue(child, Status.RUNNING)

    def append(self, request: Request, token: int) -> None:
        """The token sampled after the request's last one; also if it was preempted meanwhile."""
        assert request.status in (Status.WAITING, Status.RUNNING), f"request {request.id} is not under way"
        assert len(request.tokens) < request.max_total_tokens, f"request {request.id} has all its tokens"
        request.tokens.append(token)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits at its old place to compute its tokens again."""
        if request.status is not Status.RUNNING:
            raise ValueError(f"request {request.id} is {request.status.value}: there is nothing to preempt")
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._enqueue(request, Status.WAITING)

    def finish(self, request: Request) -> None:
        """The request is done or given up, at any moment except while the runner reads its blocks."""
        if request.status not in (Status.WAITING, Status.RUNNING):
            raise ValueError(f"request {request.id} is {request.status.value}: there is nothing to finish")
        self._release(request)
        request.status = Status.FINISHED

    # -- a step

    def schedule(self) -> Step:
        """The next step; it has no slices only if no request is waiting or running."""
        assert not self._step.slices, "the last step has not been advanced"
        slices: list[Slice] = []
        copies: list[tuple[int, int]] = []
        budget = self.max_step_tokens
        num_decoding = sum(len(r.tokens) - r.num_computed_tokens == 1 for r in self.running)
        for request in self.running:  # its last entries go when they are preempted for an earlier one
            pending = request.num_pending_tokens
            assert pending, f"request {request.id} has nothing to run: append its token or finish it"
            num_decoding -= pending == 1
            count = min(pending, self.chunk, max(1, budget - num_decoding))
            count = self._find_slots(request, count, copies)
            if count:
                slices.append(next_slice(request, count))
                budget -= count
            if not budget:
                break
        while budget and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.pop(0)
            self._enqueue(request, Status.RUNNING)
            count = min(request.num_pending_tokens, self.chunk, budget)
            slices.append(next_slice(request, count))
            budget -= count
        slices.sort(key=attrgetter("request.group"))
        self._step = Step(tuple(slices), tuple(copies))
        return self._step

    def make_room(self, wanted: Mapping[Request, int]) -> dict[Request, int]:
        """How many guesses fit behind each request's slice of the step: some, and at most as many as are wanted.

        Guesses take nobody's place: they get what the step's budget has left over, nobody is preempted for them, and
        every running request could still grow by a block.
        """
        budget = self.max_step_tokens - sum(part.count for part in self._step.slices)
        rooms = {}
        for part in self._step.slices:
            request = part.request
            most = min(
                wanted.get(request, 0), budget, self.chunk - part.count, request.max_total_tokens - part.stop - 1
            )
            if most < 1 or not part.num_sampled:
                continue
            num_missing = self._num_blocks_for(part.stop + most) - len(request.blocks)
            num_new = min(num_missing, self.allocator.num_available - len(self.running))
            if num_new > 0:
                self._grow(request, num_new)
            room = min(most, len(request.blocks) * self.block_size - part.stop)
            if room > 0:
                rooms[request] = room
                budget -= room
        return rooms

    def widen(self, guesses: Mapping[Request, Sequence[int]]) -> Step:
        """The scheduled step, with tokens behind the slices of requests that `make_room` had room for."""
        slices = [replace(part, tokens=[*part.tokens, *guesses.get(part.request, ())]) for part in self._step.slices]
        self._step = replace(self._step, slices=tuple(slices))
        return self._step

    def advance(self, step: Step, counts: Sequence[int] | None = None) -> None:
        """The step has run: its tokens are computed, and only now can others find the blocks they filled.

        counts: of each slice, how many of its first tokens count (None: all, as where nothing is guessed).
        """
        assert step is self._step, "only the last scheduled step is advanced, and once"
        self._step = Step(())
        counts = [part.count for part in step.slices] if counts is None else counts
        for part, count in zip(step.slices, counts, strict=True):
            request = part.request
            if request.status is Status.RUNNING:  # not finished or preempted since
                request.num_computed_tokens = part.start + count
                if self.prefix_caching:
                    self.prefixes.publish(request)

    def cancel(self, step: Step) -> None:
        """The step failed, and its requests were finished or preempted: none of its tokens count."""
        if step is self._step:
            self._step = Step(())

    def forget_prefixes(self) -> None:
        """Nothing is found again of what no request holds."""
        self.allocator.evict_all()

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=self.allocator.num_blocks,
            num_referenced_blocks=self.allocator.num_referenced,
            num_cached_blocks=len(self.allocator.evictable),
            num_preemptions=self._num_preemptions,
            num_queried_tokens=self._num_queried_tokens,
            num_hit_tokens=self._num_hit_tokens,
        )

    # -- how

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _accept(self, request: Request) -> None:
        name, num_tokens, most = f"request {request.id}", len(request.tokens), request.max_total_tokens
        if request.status is not Status.NEW:
            raise ValueError(f"{name} is {request.status.value}: a request is added once")
        if not 0 < num_tokens <= most:
            raise ValueError(f"{name} has {num_tokens} tokens: give it 1 to max_total_tokens = {most}")
        size = self.allocator.num_blocks * self.block_size
        if most > size:
            advice = "shorten it, lower max_tokens or raise kv_cache_memory"
            raise RequestTooLarge(f"{name} may grow to {most} tokens, the cache holds {size}: {advice}")

    def _enqueue(self, request: Request, status: Status) -> None:
        request.status = status
        queue = self.running if status is Status.RUNNING else self.waiting
        insort(queue, request, key=attrgetter("arrival"))

    def _release(self, request: Request) -> None:
        if request.status is Status.RUNNING and self.prefix_caching:
            self.prefixes.publish(request)  # right guesses were not its own yet when the step was advanced
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self.allocator.free(request.blocks)
        request.blocks, request.extents, request.prefix = [], [], []

    def _admit(self, request: Request) -> bool:
        """Give a waiting request blocks for all its tokens, if it may run and one block a head is left."""
        if len(self.running) >= self.max_running:
            return False
        is_looked_up = self.prefix_caching and request.reuse_prefix
        prefix = self.prefixes.match(request) if is_looked_up else []
        blocks = [entry.block for entry in prefix]
        num_revived = sum(not self.allocator.references[block] for block in blocks)
        num_missing = self._num_blocks_for(len(request.tokens)) - len(blocks)
        if num_revived + num_missing + len(self.running) > self.allocator.num_available:
            return False
        self.allocator.share(blocks)
        request.prefix, request.blocks = prefix, blocks
        self._grow(request, num_missing)
        request.num_computed_tokens = len(prefix) * self.block_size
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
            self._num_queried_tokens += len(request.tokens) * is_looked_up
            self._num_hit_tokens += request.num_cached_tokens
        return True

    def _find_slots(self, request: Request, count: int, copies: list[tuple[int, int]]) -> int:
        """Slots for a running request's next `count` tokens, at the cost of younger requests.

        How many got one: fewer than `count`, or none, only if there is no younger request left. (The last
        one never lacks a block for a copy: those who share with it have made theirs before.)
        """
        start, blocks = request.num_computed_tokens, request.blocks
        index = start // self.block_size
        while True:
            is_shared = index < len(blocks) and not self.allocator.is_writable(blocks[index])
            num_wanted = max(0, self._num_blocks_for(start + count) - len(blocks)) + is_shared
            if num_wanted <= self.allocator.num_available or self.running[-1] is request:
                break
            self.preempt(self.running[-1])
        num_new = min(num_wanted, self.allocator.num_available)
        if num_new:
            shared = [blocks.pop()] if is_shared else []  # a shared block that is not full is the last
            self._grow(request, num_new)
            copies += [(source, blocks[index]) for source in shared]
            self.allocator.free(shared)
        return min(count, len(blocks) * self.block_size - start)

    def _grow(self, request: Request, num_blocks: int) -> None:
        room = self._num_blocks_for(request.max_total_tokens) - len(request.blocks)
        self.allocator.allocate(request.blocks, num_blocks, room)
        request.extents = extents(request.blocks)

    def check(self) -> None:
        """Assert every invariant. It walks the whole pool: for tests and idle moments."""
        self.prefixes.check()
        self.allocator.check(Counter(block for request in self.running for block in request.blocks))
        assert len(self.running) <= self.max_running, f"{len(self.running)} requests run"
        for queue, status in ((self.running, Status.RUNNING), (self.waiting, Status.WAITING)):
            assert all(r.status is status for r in queue), f"one is not {status.value}"
            assert queue == sorted(queue, key=attrgetter("arrival")), f"{status.value}: out of order"
        for request in self.waiting:
            assert (request.blocks, request.num_computed_tokens) == ([], 0), f"{request.id} holds blocks"
        for request in self.running:
            self._check_table(request)
        self._check_step(self._step)

    def _check_table(self, request: Request) -> None:
        num_computed, num_blocks = request.num_computed_tokens, len(request.blocks)
        assert num_computed <= len(request.tokens) <= request.max_total_tokens, f"{request.id}: too long"
        assert self._num_blocks_for(num_computed) <= num_blocks, f"{request.id}: computed without blocks"
        assert num_blocks <= self._num_blocks_for(request.max_total_tokens), f"{request.id}: too many blocks"
        assert request.extents == extents(request.blocks), f"{request.id}: old extents"
        for block in request.blocks[num_computed // self.block_size :]:
            assert block not in self.prefixes, f"block {block} is advertised before it is computed"

    def _check_step(self, step: Step) -> None:
        assert sum(part.count for part in step.slices) <= self.max_step_tokens, "a step over its budget"
        assert all(0 < part.count <= self.chunk for part in step.slices), "an empty or oversized slice"
        for part in step.slices:
            request, end = part.request, part.start + part.count
            if request.status is Status.RUNNING:
                assert part.start == request.num_computed_tokens, f"{request.id}: a slice from elsewhere"
                assert end <= len(request.blocks) * self.block_size, f"{request.id}: tokens without slots"
                for block in request.blocks[part.start // self.block_size : self._num_blocks_for(end)]:
                    assert self.allocator.is_writable(block), f"block {block} is written while others read"


def next_slice(request: Request, count: int) -> Slice:
    """The next `count` of a request's pending tokens."""
    start = request.num_computed_tokens
    return Slice(request, start, request.tokens[start : start + count])
