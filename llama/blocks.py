"""The pool of blocks in which requests keep their keys and values, and what of it later requests can find again.

Token p of a request lives in slot p % block_size of its block number p // block_size. Blocks are handed out as a
request grows, shared by count, and kept after their last user for requests that begin with the same tokens (paged
attention: Kwon et al. 2023, arXiv:2309.06180).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise

from llama.request import CachedBlock, Request


def extents(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive blocks as (first block, number of blocks): [7, 8, 9, 4] -> [(7, 3), (4, 1)]."""
    starts = [i for i, block in enumerate(blocks) if not i or block != blocks[i - 1] + 1]
    return [(blocks[i], j - i) for i, j in pairwise([*starts, len(blocks)])]


class PrefixCache:
    """Full blocks by a sha256 chain over the salt and every token up to their end.

    A digest only proposes: tokens and parent are compared before a block is reused, so that a collision
    costs a miss and never a wrong answer. Tests force collisions with a small `digest_size` (bytes).
    """

    def __init__(self, block_size: int, digest_size: int = 32):
        self.block_size = block_size
        self.digest_size = digest_size
        self._by_digest: dict[bytes, CachedBlock] = {}
        self.blocks: dict[int, CachedBlock] = {}

    def __contains__(self, block: object) -> bool:
        return block in self.blocks

    def match(self, request: Request) -> list[CachedBlock]:
        """The longest cached beginning, in full blocks, that leaves at least the last token to compute."""
        found: list[CachedBlock] = []
        while len(found) < (len(request.tokens) - 1) // self.block_size:
            key = self._key(request, found)
            entry = self._by_digest.get(key[0])
            if entry is None or key != (entry.digest, entry.parent, entry.tokens):
                break
            found.append(entry)
        return found

    def publish(self, request: Request) -> None:
        """Let others find the full blocks that the request has computed. Extends request.prefix."""
        num_known = min(request.num_computed_tokens, len(request.tokens))  # a right guess is appended later
        while len(request.prefix) < num_known // self.block_size:
            key = self._key(request, request.prefix)
            entry = self._by_digest.get(key[0])
            if entry is None:
                entry = CachedBlock(request.blocks[len(request.prefix)], *key)
                self._by_digest[entry.digest] = self.blocks[entry.block] = entry
            elif key != (entry.digest, entry.parent, entry.tokens):
                break  # a collision: nobody could find what lies behind it
            request.prefix.append(entry)

    def forget(self, block: int) -> None:
        del self._by_digest[self.blocks.pop(block).digest]

    def _key(self, request: Request, prefix: list[CachedBlock]) -> tuple[bytes, CachedBlock | bytes, bytes]:
        """(digest, parent, tokens) of the request's block behind `prefix`."""
        index = len(prefix)
        start = index * self.block_size
        tokens = array("q", request.tokens[start : start + self.block_size]).tobytes()
        if index == len(request.digests):
            chain = request.digests[-1] if index else sha256(request.salt).digest()
            request.digests.append(sha256(chain + tokens).digest()[: self.digest_size])
        return request.digests[index], prefix[-1] if prefix else request.salt, tokens

    def check(self) -> None:
        """Assert that digests and blocks are one to one."""
        assert len(self._by_digest) == len(self.blocks), "digests and cached blocks differ in number"
        for block, entry in self.blocks.items():
            assert entry.block == block, f"block {block} is cached as {entry.block}"
            assert self._by_digest.get(entry.digest) is entry, f"block {block} is not under its digest"


# The state of a block: one byte each, so that a free run, bytes(size), is found at the speed of memory.
FREE, PROMISED, CACHED, USED = range(4)
PROMISED_RUN = re.compile(bytes([PROMISED]) + b"+")
GROWTH = 32  # blocks that a new run should have to spare, if evicting as many gives it that


class BlockAllocator:
    """Hands out blocks in runs as long as it can: attention makes one call for each run of a request.

    A block is USED while requests hold it; then CACHED, if `prefixes` knows it, until it is evicted (least
    recently used first); else FREE. Free blocks behind a request's last one are PROMISED to its growth,
    which keeps other requests away for as long as they find room elsewhere.
    """

    def __init__(self, num_blocks: int, prefixes: PrefixCache):
        self.num_blocks = num_blocks
        self.num_referenced = 0
        self.prefixes = prefixes
        self.references = [0] * num_blocks
        self.evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._states = bytearray(num_blocks)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: all that no request holds."""
        return self.num_blocks - self.num_referenced

    def is_writable(self, block: int) -> bool:
        """One request holds the block, and no other can find it."""
        return self.references[block] == 1 and block not in self.prefixes

    def allocate(self, blocks: list[int], count: int, room: int) -> None:
        """Append `count` blocks to a request's `blocks`, each behind the last one where that is possible.

        room: how many the request may come to need from here on, these included.
        """
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        for taken in range(count):
            block = blocks[-1] + 1 if blocks else self.num_blocks
            if block >= self.num_blocks or self._states[block] > PROMISED:
                block = self._start_run(count - taken, room - taken)
            self._states[block] = USED
            self.references[block] = 1
            blocks.append(block)
        self.num_referenced += count
        self._turn(blocks[-1] + 1, room - count, (FREE, PROMISED), PROMISED)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold cached or used blocks once more."""
        for block in blocks:
            if not self.references[block]:
                del self.evictable[block]
                self._states[block] = USED
                self.num_referenced += 1
            self.references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a request's blocks, the last first, so that prefixes are evicted from their ends."""
        for block in reversed(blocks):
            if not self.references[block]:
                raise ValueError(f"block {block} is freed twice")
            self.references[block] -= 1
            if not self.references[block]:
                self.num_referenced -= 1
                self._states[block] = FREE
                if block in self.prefixes:
                    self._states[block] = CACHED
                    self.evictable[block] = None
        if blocks and not self.references[blocks[-1]]:
            self._turn(blocks[-1] + 1, self.num_blocks, (PROMISED,), FREE)

    def evict_all(self) -> None:
        """Make every block free that no request holds."""
        while self.evictable:
            self._evict()

    def _evict(self) -> None:
        """Make the least recently used of these blocks free."""
        block, _ = self.evictable.popitem(last=False)
        self.prefixes.forget(block)
        self._states[block] = FREE

    def _start_run(self, need: int, room: int) -> int:
        """The first block of a new run, with all its room behind it or what comes nearest to that."""
        goal = min(room, need + GROWTH)
        start, size = self._find_free(room)
        for _ in range(min(goal, len(self.evictable))):
            if size >= goal:
                break
            self._evict()
            start, size = self._find_free(goal)
        if size < room:  # the far half of the longest promise may be longer
            longest = max(PROMISED_RUN.findall(self._states), key=len, default=b"")
            if len(longest) > 2 * size:
                start = self._states.find(longest) + len(longest) // 2
                self._turn(start, self.num_blocks, (PROMISED,), FREE)
        return start

    def _find_free(self, size: int) -> tuple[int, int]:
        """(start, size) of the first free run of that size, or a half, a quarter, ... of it; size 0: none."""
        start = -1
        while size and (start := self._states.find(bytes(size))) < 0:
            size //= 2
        return start, size

    def _turn(self, start: int, limit: int, old: tuple[int, ...], new: int) -> None:
        """Give the run of `old` states from start on, at most `limit` blocks, the `new` state."""
        run = self._states[start : start + limit]
        size = len(run) - len(run.lstrip(bytes(old)))
        self._states[start : start + size] = bytes([new]) * size

    def check(self, holders: Counter[int]) -> None:
        """Assert that each block is in the one state that its holders (tables with that block) call for."""
        for block, (count, state) in enumerate(zip(self.references, self._states, strict=True)):
            behind = self._states[block - 1] if block else FREE
            assert count == holders[block], f"block {block}: {count} references, {holders[block]} holders"
            assert (state == USED) == (count > 0), f"block {block}: {count} references in state {state}"
            assert (state == CACHED) == (block in self.prefixes and not count), f"block {block}: {state}"
            assert (state == CACHED) == (block in self.evictable), f"block {block}: evictable in {state}"
            assert state != PROMISED or behind in (PROMISED, USED), f"block {block} is promised to nobody"
        assert self.num_referenced == self.num_blocks - self.references.count(0), "miscounted blocks"
