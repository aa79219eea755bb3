"""Which replica a request goes to: one that has lately read the same beginning, unless others have less to do.

An engine keeps keys and values of prompts that it has read, so that a dialog's next turn, or another question under the
same system prompt, is cheap where the beginning was, and nowhere else.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

BLOCK = 256  # characters: some four blocks of an engine's cache
MOST_BLOCKS = 1 << 16  # that are remembered, some 10 MB
MOST_AHEAD = 4  # so many requests more than the least busy one may a replica have, and still get what it knows
FIELDS = ("system", "instructions", "tools", "functions", "messages", "prompt", "input")  # as prompts have them


def beginnings(body: bytes, salt: bytes = b"") -> list[bytes]:
    """A digest for each whole block of what a request's body asks, of everything up to the block's end.

    Bodies that differ in their `model`, their `cache_salt` or the `salt` share no cache, and no digest.
    """
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(parsed, dict):
        return []
    text = json.dumps([parsed[field] for field in FIELDS if field in parsed])
    digest = blake2b(repr((salt, parsed.get("model"), parsed.get("cache_salt"))).encode(), digest_size=8)
    found = []
    for end in range(BLOCK, len(text) + 1, BLOCK):
        digest.update(text[end - BLOCK : end].encode())
        found.append(digest.digest())
    return found


class Affinity:
    """What replicas, by any names, have lately read; of the blocks that nobody asked for the longest are forgotten."""

    def __init__(self, most_blocks: int = MOST_BLOCKS):
        self.most_blocks = most_blocks
        self._readers: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()  # of a beginning, the latest last
        self._turns: dict[str, int] = {}  # when each replica was chosen last, counted in choices

    def choose(self, begins: Sequence[bytes], num_open: Mapping[str, int]) -> str:
        """The replica for a request, of those whose requests `num_open` counts: there is at least one."""
        name = self._reader(begins, num_open)
        if name is None:
            name = min(num_open, key=lambda name: (num_open[name], self._turns.get(name, 0)))
        self._turns[name] = max(self._turns.values(), default=0) + 1
        return name

    def record(self, begins: Sequence[bytes], name: str) -> None:
        """The replica got the request."""
        for digest in begins:
            others = (other for other in self._readers.pop(digest, ()) if other != name)
            self._readers[digest] = (*others, name)
        while len(self._readers) > self.most_blocks:
            self._readers.popitem(last=False)

    def _reader(self, begins: Sequence[bytes], num_open: Mapping[str, int]) -> str | None:
        """One that has read the longest known beginning, and is not too busy."""
        most = min(num_open.values()) + MOST_AHEAD
        for digest in reversed(begins):
            if known := [name for name in self._readers.get(digest, ()) if num_open.get(name, most + 1) <= most]:
                return min(known, key=num_open.__getitem__)
        return None
