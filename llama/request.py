"""A sequence on its way, and what a step does of it. Plain Python: no tensor and no model in sight."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False, slots=True)
class CachedBlock:
    """What the keys and values in a full block were computed from: its tokens, behind all of its parent."""

    block: int
    digest: bytes
    parent: CachedBlock | bytes = field(repr=False)  # the first block of a sequence hangs on its salt
    tokens: bytes


class Status(enum.Enum):
    NEW = "new"
    WAITING = "waiting"  # without blocks
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence of tokens to be continued. `tokens` changes only through Scheduler.append."""

    id: int
    tokens: list[int]  # the prompt, then what was generated
    max_total_tokens: int  # prompt + the most that it may generate
    salt: bytes = b""  # prefixes are shared only under the same salt
    reuse_prefix: bool = True  # False: every prompt token is computed (prompt logprobs need them all)
    params: object = None  # the caller's own; never looked at here
    group: int = 0  # requests of one group stand side by side in a step

    # filled by the scheduler
    status: Status = field(default=Status.NEW, init=False)
    arrival: int = field(default=0, init=False)  # its place in the order of service
    num_prompt_tokens: int = field(default=0, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)  # those its first admission found in the cache
    num_preemptions: int = field(default=0, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    extents: list[tuple[int, int]] = field(default_factory=list, init=False)  # of its blocks
    digests: list[bytes] = field(default_factory=list, init=False)  # of its full blocks, each hashed once
    prefix: list[CachedBlock] = field(default_factory=list, init=False)  # its full blocks, or their twins

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def num_pending_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens


@dataclass(frozen=True, slots=True)
class Slice:
    """Run these tokens of a request, the first of them at position `start`.

    They are the request's own, and behind its last one may come tokens that are only guessed: whether those count is
    known once the step has run.
    """

    request: Request
    start: int
    tokens: Sequence[int]

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.tokens)

    @property
    def num_sampled(self) -> int:
        """How many of its last rows choose a token: that of the request's last token, and those behind it."""
        return max(0, self.stop - len(self.request.tokens) + 1)


@dataclass(frozen=True, slots=True)
class Step:
    """What to run: first every block copy (source, destination), in order; then all slices at once."""

    slices: tuple[Slice, ...]
    copies: tuple[tuple[int, int], ...] = ()
