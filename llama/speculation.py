"""How many of a drafter's guesses a step tries, and what came of them.

Decoding reads every weight for one token, and a few rows more are read for at little cost. So tokens are guessed,
all rows run in one step, each is sampled with its own key as if the guesses before it were right, and a guess counts
where it equals what was sampled there. The answer is that of the plain sampler, token for token; no distribution is
corrected (as in Leviathan et al. 2023, arXiv:2211.17192), since a token is a function of its logits and its key alone.

What pays is decided anew for each step, from how long steps of so many rows take and from how often each choice's
guesses have been right lately. Both are learned on the way: nothing is measured before the first request.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from statistics import median
from weakref import WeakKeyDictionary

from llama.choice import Choice, Turn
from llama.drafters import Drafter, Guesses
from llama.request import Request, Slice, Step
from llama.sampling import Sampled
from llama.scheduler import Scheduler

MOST_GUESSES = 31  # behind one token; of 32 rows each took 0.85 (AVX-512) to 0.95 (AVX2) of what it takes of 16
MOST_REQUESTS = 32  # in a step that guesses: with more, rows cost what they are worth
WORTHWHILE = 1.05  # how much faster tokens must seem to come: less is lost where an estimate errs
LEARNING = 0.9  # of what came as no surprise at all: three that fail halve low odds
FORGETTING = 0.01  # how far the odds go back, in a step without a guess, to what they were at first


def step_clock(device_type: str) -> Callable[[], float]:
    """What to time steps with: this thread's own time where it computes, so that a busy machine does not count."""
    is_fine = time.get_clock_info("thread_time").resolution <= 1e-4
    return time.thread_time if device_type == "cpu" and is_fine else time.perf_counter


class StepCosts:
    """How much longer a step of so many rows takes than one of a single row, as steps have shown.

    A step is compared with the latest that tried no guess, so that neither a context that grows nor a machine that is
    busy now and then counts. A size that was not compared three times lately is thought to cost what makes it worth a
    try: a tenth more for each row up to eight, and above four fifths of what its rows are more.
    """

    NUM_KEPT = 15
    NUM_NEEDED = 3
    NUM_PLAIN = 9
    LATELY = 128  # steps since a plain one, for it to say something
    FOREVER = 512  # steps since the last of a size, for what was seen of it to be forgotten

    def __init__(self) -> None:
        self._num_steps = 0
        self._plain: deque[tuple[int, int, float]] = deque(maxlen=self.NUM_PLAIN)  # (step, rows, seconds)
        self._seen: dict[int, deque[float]] = {}
        self._last_seen: dict[int, int] = {}
        self._known: dict[int, float] = {1: 1.0}
        self._sizes = [1]  # those that are known, ascending

    def record(self, num_rows: int, seconds: float, guessed: bool) -> None:
        """A step of so many rows, some of them guesses or none, took so long."""
        self._num_steps += 1
        if not guessed:
            self._plain.append((self._num_steps, num_rows, seconds))
        if num_rows > 1:
            self._compare(num_rows, seconds)
        if self._num_steps % self.FOREVER == 0:
            for size in [size for size, last in self._last_seen.items() if last <= self._num_steps - self.FOREVER]:
                del self._seen[size], self._last_seen[size]
                self._known.pop(size, None)
            self._sizes = sorted(self._known)

    def _compare(self, num_rows: int, seconds: float) -> None:
        others = self._singles(num_rows)
        if len(others) < self.NUM_NEEDED:
            return
        self._last_seen[num_rows] = self._num_steps
        seen = self._seen.setdefault(num_rows, deque(maxlen=self.NUM_KEPT))
        seen.append(seconds / median(others))
        if len(seen) >= self.NUM_NEEDED:
            self._known[num_rows] = median(seen)
            self._sizes = sorted(self._known)

    @property
    def single(self) -> float | None:
        """Seconds that a step of one row takes at present; None where too few plain steps were seen lately to say."""
        singles = self._singles()
        return median(singles) if len(singles) >= self.NUM_NEEDED else None

    def _singles(self, but: int = 0) -> list[float]:
        """What the latest plain steps would have taken for one row, but for those of one size."""
        first = self._num_steps - self.LATELY
        return [seconds / self(rows) for step, rows, seconds in self._plain if step > first and rows != but]

    def __call__(self, num_rows: int) -> float:
        known, sizes = self._known, self._sizes
        if num_rows in known:
            return known[num_rows]
        place = bisect_left(sizes, num_rows)
        low = sizes[place - 1]
        if place == len(sizes):
            return known[low] * self._expected(num_rows) / self._expected(low)
        high = sizes[place]
        return known[low] + (known[high] - known[low]) * (num_rows - low) / (high - low)

    @staticmethod
    def _expected(num_rows: int) -> float:
        return (0.9 + 0.1 * min(num_rows, 8)) * (1 + 0.8 * max(0, num_rows / 8 - 1))


@dataclass
class Outlook:
    """How much more often one choice's guesses are right than such guesses are: by so much in log-odds.

    Learned guess by guess, as logistic regression learns a constant.
    """

    more: float = 0.0
    guesses: Guesses = field(default_factory=Guesses)  # the latest, tried or not

    def odds(self, usual: float) -> float:
        """Of a guess that is usually right so often, more than never and less than always."""
        return 1 / (1 + (1 / usual - 1) * math.exp(-self.more))

    def judge(self, came: Sequence[int]) -> None:
        """`came`: the tokens that the step brought, at least one."""
        if not self.guesses.tokens:  # so that what did not pay is tried again some time
            self.more -= FORGETTING * self.more
        for guess, usual, token in zip(self.guesses.tokens, self.guesses.odds, came, strict=False):
            self.more += LEARNING * ((guess == token) - self.odds(usual))
        self.guesses = Guesses()


class Speculation:
    """Puts a drafter's guesses into steps in which everybody decodes, as many as pay.

    Choices whose next token depends on more than their tokens get none: those under a constraint, whose state cannot be
    taken back, those with processors of the caller's own, and those that share a request until their prompt is done.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        clock: Callable[[], float] = time.perf_counter,
        rows_alone: Callable[[int], int] = lambda num_seen: MOST_GUESSES + 1,
    ):
        """With no drafter steps stay as they are. `clock`: seconds, by which steps are compared. `rows_alone`: how many
        rows of a request have the bits that each would have alone, where they see so many tokens.
        """
        self.drafter = drafter
        self.clock = clock
        self.rows_alone = rows_alone
        self.costs = StepCosts()
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self._outlooks: WeakKeyDictionary[Choice, Outlook] = WeakKeyDictionary()
        self._rounds: deque[float] = deque(maxlen=StepCosts.NUM_KEPT)  # what a guess took, of a row's step
        self._num_rows = 0  # of a step in which everybody decodes, without its guesses; else 0
        self._num_guesses = 0

    def widen(self, scheduler: Scheduler, step: Step, choices: Mapping[Request, Sequence[Choice]]) -> Step:
        """The scheduler's step, with guesses behind the requests' own tokens."""
        if self.drafter is None:
            return step
        slices = step.slices
        self._num_rows = len(slices) if all(part.count == part.num_sampled == 1 for part in slices) else 0
        self._num_guesses = 0
        if not 0 < self._num_rows <= MOST_REQUESTS:
            return step
        rooms = {choice: room for part in slices for choice, room in self._rooms(part, choices[part.request])}
        guesses = self._look_up(rooms) if self.drafter.odds is None else self._ask(scheduler, rooms)
        if not guesses:
            return step
        tried = self._fit(self._num_rows, guesses)
        granted = scheduler.make_room({choice.request: count for choice, count in tried.items()})
        if not granted:
            return step
        self._num_guesses = sum(granted.values())
        self.num_drafts += len(granted)
        self.num_draft_tokens += self._num_guesses
        tokens = {choice.request: self._outlooks[choice].guesses.tokens for choice in tried}
        return scheduler.widen({request: tokens[request][:count] for request, count in granted.items()})

    def learn(self, turns: Sequence[Turn], sampled: Sampled, seconds: float) -> None:
        """What the step brought, and how long it took the model and the sampler."""
        if self.drafter is None:
            return
        if self._num_rows:
            self.costs.record(self._num_rows + self._num_guesses, seconds, guessed=self._num_guesses > 0)
        for turn in turns:
            num_right = turn.num_right(sampled)
            self.num_accepted_tokens += num_right
            if turn.choice in self._outlooks:
                self._outlooks[turn.choice].judge(sampled.tokens[turn.first : turn.first + num_right + 1])

    def _rooms(self, part: Slice, choices: Sequence[Choice]) -> list[tuple[Choice, int]]:
        num_tokens = len(part.request.tokens)
        room = min(part.request.max_total_tokens - num_tokens - 1, MOST_GUESSES)
        if len(choices) > 1 or not choices[0].can_be_guessed or room < 1:
            return []
        return [(choices[0], min(room, self.rows_alone(num_tokens + room) - 1))]

    def _outlook(self, choice: Choice) -> Outlook:
        return self._outlooks.setdefault(choice, Outlook())

    def _look_up(self, rooms: Mapping[Choice, int]) -> dict[Choice, Sequence[float]]:
        """How often each guess is right of a drafter that takes no time. Mostly there is none, which must be quick."""
        found = self._noted(self.drafter.propose(rooms))
        return found if found and self.costs.single is not None else {}

    def _ask(self, scheduler: Scheduler, rooms: Mapping[Choice, int]) -> dict[Choice, Sequence[float]]:
        """The same of a drafter that takes time, asked for as many as pay."""
        single = self.costs.single
        if single is None:
            return {}
        odds = {choice: [self.drafter.odds] * room for choice, room in rooms.items()}
        wanted = self._fit(self._num_rows, odds, median(self._rounds) if self._rounds else 0.0)
        granted = scheduler.make_room({choice.request: room for choice, room in wanted.items()})
        started = self.clock()
        guesses = self.drafter.propose(
            {choice: granted[choice.request] for choice in wanted if choice.request in granted}
        )
        num_rounds = max((len(own.tokens) for own in guesses.values()), default=0)
        if num_rounds:
            self._rounds.append((self.clock() - started) / num_rounds / single)
        return self._noted(guesses)

    def _noted(self, guesses: Mapping[Choice, Guesses]) -> dict[Choice, Sequence[float]]:
        """Keeps guesses to be judged, and gives their odds."""
        found = {choice: own for choice, own in guesses.items() if own.tokens}
        for choice, own in found.items():
            self._outlook(choice).guesses = own
        return {choice: own.odds for choice, own in found.items()}

    def _fit(
        self, num_requests: int, guesses: Mapping[Choice, Sequence[float]], round_cost: float = 0.0
    ) -> dict[Choice, int]:
        """How many guesses to try of each choice, that tokens may come fastest; no entry for none.

        guesses: how often each is usually right. round_cost: what it takes to have one more guess of each, of the time
        of one row's step.
        """
        candidates = []
        for choice, usual in guesses.items():
            right = accumulate(map(self._outlook(choice).odds, usual), mul)  # with all before it
            candidates += [(odds, depth, choice) for depth, odds in enumerate(right, 1)]
        candidates.sort(key=lambda candidate: -candidate[0])  # stable: a choice's own stay in order
        most, num_tried = WORTHWHILE * num_requests / self.costs(num_requests), 0
        num_tokens, num_rounds = float(num_requests), 0
        for i, (odds, depth, _) in enumerate(candidates, 1):
            num_tokens += odds
            num_rounds = max(num_rounds, depth)
            rate = num_tokens / (self.costs(num_requests + i) + num_rounds * round_cost)
            if rate > most:
                most, num_tried = rate, i
        counts: dict[Choice, int] = {}
        for _, depth, choice in candidates[:num_tried]:
            counts[choice] = depth
        return counts
