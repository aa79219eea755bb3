"""Where guesses at an answer's next tokens come from: its own text so far, or a smaller model.

A guess costs a row of the next step, and counts where it is what is sampled there (`speculation.py`): a bad drafter
wastes time and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor

from llama.choice import Choice
from llama.request import Request, Slice, Step
from llama.runner import Pack, Runner
from llama.sampling import sample


@dataclass(frozen=True)
class Guesses:
    """Tokens that may come next, and the odds that each is right, those before it being so: as such guesses are."""

    tokens: Sequence[int] = ()
    odds: Sequence[float] = ()


class Drafter(Protocol):
    """What guesses. `odds`: how often its guesses are right, which says how many to ask for, since they take time;
    None where they take none worth counting, and more may be asked for than are used.
    """

    odds: float | None

    def propose(self, rooms: Mapping[Choice, int]) -> dict[Choice, Guesses]:
        """For each choice at most so many: fewer or none where it has no idea.

        Where guessing takes time, the cache's slots for them are there, behind the request's own.
        """


class NGrams:
    """Where in a text each run of three, and of two, tokens was last seen: what followed there may follow again.

    Saxena, "Prompt Lookup Decoding", 2023.
    """

    SIZES = (3, 2)  # the longer one is the better sign
    MOST = 16  # tokens that are compared to say how good a sign it is

    def __init__(self) -> None:
        self._follower: dict[tuple[int, ...], int] = {}  # the position behind its latest occurrence
        self._num_read = 0

    def following(self, tokens: Sequence[int], most: int) -> Guesses:
        """Up to `most` tokens for behind `tokens`, which begin with all that was given before.

        What followed may reach into what is guessed: a text that repeats itself goes on so.
        """
        self._read(tokens)
        for size in self.SIZES:
            start = self._follower.get(tuple(tokens[-size:]))
            if start is not None:
                seen = tokens[start : start + most]
                behind, there = tokens[-self.MOST :], tokens[max(0, start - self.MOST) : start]
                length = count_equal(behind[::-1], there[::-1])
                return Guesses((seen * -(-most // len(seen)))[:most], [odds_behind(length + i) for i in range(most)])
        return Guesses()

    def _read(self, tokens: Sequence[int]) -> None:
        """Notes all runs that a token follows."""
        for end in range(max(1, self._num_read), len(tokens)):
            for size in self.SIZES:
                if size <= end:
                    self._follower[tuple(tokens[end - size : end])] = end
        self._num_read = len(tokens)


def odds_behind(length: int) -> float:
    """How often a text goes on as it did behind the same tokens, so many of them.

    SmolLM2's answers, of 8 prompts in its own words and 4 about a text, at temperature 1 and greedily: of the tokens
    behind 2 that stood there before 0.31 to 0.47 were the same, behind 3 0.44 to 0.82, behind 4 0.52 to 0.82, behind 8
    0.92 to 1, behind 12 and more 0.97 to 1.
    """
    return 1 - 2 * length**-1.5


class Lookup:
    """Guesses that an answer goes on as its prompt, or itself, did behind the same words."""

    odds = None

    def __init__(self) -> None:
        self._ngrams: WeakKeyDictionary[Choice, NGrams] = WeakKeyDictionary()

    def propose(self, rooms: Mapping[Choice, int]) -> dict[Choice, Guesses]:
        found = {}
        for choice, room in rooms.items():
            ngrams = self._ngrams.setdefault(choice, NGrams())
            found[choice] = ngrams.following(choice.request.tokens, room)
        return found


DRAFTERS: dict[str, Callable[[], Drafter]] = {"lookup": Lookup}
"""Those that need no model, by the name that `Llama.build(draft=)` and `--draft` take."""


@dataclass
class Held:
    """What a draft model's cache has of a request, in the request's own blocks."""

    num_preemptions: int  # of the request, when it was stored: what is preempted has other blocks afterwards
    num_tokens: int = 0  # of the request's own, from the first on
    guesses: list[int] = field(default_factory=list)  # stored behind them
    blocks: list[int] = field(default_factory=list)  # where that is
    num_stamped: int = 0  # blocks that later requests can find


class DraftModel:
    """A small model of the same vocabulary, which runs ahead: the token that it would sample with the choice's own key.

    Two samplers that draw with one key from nearly the same probabilities mostly come to the same token.

    Its keys and values lie in a pool of its own, for every token at the place that the large model's have in theirs, so
    that nothing is allocated twice. What it lacks of a request it computes when it is first asked about it; what it has
    of blocks that requests share it finds by their digests.
    """

    odds = 0.8

    def __init__(self, runner: Runner, vocab_size: int, max_seq_len: int, max_step_tokens: int = 512):
        """`vocab_size`: of the large model. `max_step_tokens`: how much of prompts it reads each time it is asked."""
        self.runner = runner
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.max_step_tokens = max_step_tokens
        self._held: WeakKeyDictionary[Request, Held] = WeakKeyDictionary()
        self._digests: dict[int, bytes] = {}  # by block: of the tokens whose keys and values fill it

    def propose(self, rooms: Mapping[Choice, int]) -> dict[Choice, Guesses]:
        guesses: dict[Choice, list[int]] = {choice: [] for choice in rooms}
        parts = self._unread(rooms)
        while parts:
            logits = self._run(list(parts.values()))
            ready = [choice for choice, part in parts.items() if part.stop >= len(choice.request.tokens)]
            sampled = sample(logits, [choice.sample_row(guesses[choice]) for choice in ready])
            parts = {}
            for choice, token in zip(ready, sampled.tokens, strict=True):
                own, request = guesses[choice], choice.request
                if token < 0 or token in choice.stop_ids:  # there is none, or nothing comes behind it
                    continue
                own.append(token)
                room = min(rooms[choice], self.max_seq_len - len(request.tokens))
                if len(own) < room:
                    parts[choice] = Slice(request, len(request.tokens) + len(own) - 1, [token])
        return {choice: Guesses(own, [self.odds] * len(own)) for choice, own in guesses.items()}

    def _unread(self, rooms: Mapping[Choice, int]) -> dict[Choice, Slice]:
        """What is to be read of the requests' own tokens: at least the last, and of long prompts the next part."""
        budget, parts = self.max_step_tokens, {}
        for choice, room in rooms.items():
            request = choice.request
            start = self._count_held(request)
            tokens = request.tokens[start : start + budget]
            if room and tokens and len(request.tokens) < self.max_seq_len:
                parts[choice] = Slice(request, start, tokens)
                budget -= len(tokens)
        return parts

    def _run(self, parts: Sequence[Slice]) -> Tensor:
        """The logits behind the parts that reach their request's end, as wide as the large model's."""
        num_logits = [int(part.stop >= len(part.request.tokens)) for part in parts]
        pack = Pack.of(Step(tuple(parts)), num_logits, self.runner.block_size)
        for part in parts:
            self._note(part)
        logits = self.runner.run(replace(pack, runs=[])).logits  # adapters are the large model's alone
        padding = self.vocab_size - logits.shape[-1]  # tables of one vocabulary may be padded to different sizes
        return F.pad(logits, (0, padding), value=-math.inf) if padding else logits

    def _note(self, part: Slice) -> None:
        """Remembers what is about to be stored, and forgets what was there before."""
        request, block_size = part.request, self.runner.block_size
        held = self._held[request]
        num_own = len(request.tokens)
        held.guesses = [*held.guesses, *part.tokens] if part.start >= num_own else []
        held.num_tokens = min(part.stop, num_own)
        held.blocks = list(request.blocks[: -(-part.stop // block_size)])
        first = part.start // block_size
        held.num_stamped = min(held.num_stamped, first)
        for block in held.blocks[first:]:
            self._digests.pop(block, None)

    def _count_held(self, request: Request) -> int:
        """How many of a request's tokens need not be read; the last one always is, for what comes behind it."""
        held, block_size = self._held.get(request), self.runner.block_size
        if held is None or held.num_preemptions != request.num_preemptions:
            pairs = zip(request.blocks, request.digests, strict=False)
            known = list(takewhile(lambda pair: self._digests.get(pair[0]) == pair[1], pairs))
            held = Held(request.num_preemptions, len(known) * block_size, num_stamped=len(known))
            self._held[request] = held
        else:
            held.num_tokens += count_equal(held.guesses, request.tokens[held.num_tokens :])
            held.guesses = []
            num_blocks = count_equal(held.blocks, request.blocks)  # others: one that was shared has been copied
            held.num_tokens = min(held.num_tokens, num_blocks * block_size)
            full = min(held.num_tokens // block_size, len(request.digests))
            for i in range(held.num_stamped, full):
                self._digests[request.blocks[i]] = request.digests[i]
            held.num_stamped = max(held.num_stamped, full)
        return min(held.num_tokens, len(request.tokens) - 1)


def count_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))
