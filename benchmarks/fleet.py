"""A fleet of replicas, simulated from measured service times: waiting, first tokens and cost against load and routing.

    llama bench --precision sym_int4 --json speed.json
    python benchmarks/fleet.py speed.json --plot fleet.svg

A replica is what this engine is: each step gives every running request one token and takes up to 512 tokens of waiting
prompts along; its seconds are `base + row * requests + prompt * tokens`, fitted to what `llama bench` measured. A
conversation has some turns, each asks about all that came before, and a replica that has answered the turn before
still holds it, as long as its cache has room (least recently used goes first). Who gets a request:

    random   any replica
    least    the one with the fewest requests
    prefix   the one that answered the turn before, unless it has more than its share; then the one with the fewest

Conversations begin at random moments (Poisson), with so many that the fleet would be busy for `load` of its time if
nothing were ever cached: above 1 only a fleet that finds its prefixes keeps up. It begins in the midst of things: with
the conversations that would be under way, their turns so far held by replicas. All fleets are simulated for the same
time, whose first fifth does not count; those of more than 64 replicas at one load, since they take minutes. The figures
of a fleet are the same each time: the seed is fixed. What it leaves out: the network, replicas that fail, prompts that
differ in kind. The last line is JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import numpy as np
from common.timing import report

REPLICAS = (1, 4, 16, 64, 256, 1000)
LOADS = (0.4, 0.7, 0.95, 1.2, 1.5)
FULL = 0.95  # the load at which sizes of fleets are compared
LARGE = 64  # replicas, above which there is only that load
MIDDLE = 16  # replicas, whose loads are compared in the plot
BEFORE = 300.0  # seconds before the simulated time, in which what is under way had begun
STEP_TOKENS = 512  # of prompts, that a step takes along
MOST_RUNNING = 32  # requests of a replica that run at once
CACHE_TOKENS = 100_000  # that a replica's cache holds
TURNS, THINKING = 4, 15.0  # of a conversation on average; seconds between an answer and the next question
QUESTION, ANSWER = 60, 120  # tokens on average
SYSTEM = 200  # tokens with which every conversation begins
WARM_UP = 0.2  # share of the time that does not count


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: `base`, and what each running request and each token of a prompt adds."""

    base: float
    row: float
    prompt: float

    @classmethod
    def measured(cls, path: Path, precision: str | None) -> Speed:
        """Fitted to this engine's figures in a file that `llama bench --json` wrote."""
        figures = [one for one in json.loads(path.read_text())["figures"] if one["side"] == "llama"]
        precision = precision or next((one["precision"] for one in figures), None)
        seconds = {one["work"]: one["seconds"] for one in figures if one["precision"] == precision}
        steps = {int(work.split("-")[1]): took for work, took in seconds.items() if work.startswith("batch")}
        if "context-512" in seconds:
            steps.setdefault(1, seconds["context-512"])
        if len(steps) < 2 or "prompt-512" not in seconds:
            raise SystemExit(f"{path} lacks figures: measure with --works prompt-512,context-512,batch-8,batch-32")
        row, base = np.polyfit(list(steps), list(steps.values()), 1)
        return cls(float(base), float(row), max(0.0, seconds["prompt-512"] - float(base)) / 512)

    def seconds(self, rows: int, prompt_tokens: int) -> float:
        return self.base + self.row * rows + self.prompt * prompt_tokens

    def request_seconds(self, prompt: float, answer: float) -> float:
        """Of a full replica's time that a request takes, when nothing is cached."""
        return prompt * self.prompt + answer * (self.base / MOST_RUNNING + self.row)


@dataclass
class Request:
    conversation: int
    prompt: int  # tokens, all turns before included
    answer: int
    turns_left: int
    arrived: float
    uncached: int = 0  # tokens of the prompt that are still to be computed
    left: int = 0  # tokens of the answer that are still to come
    first: float = 0.0  # when its first token came


@dataclass
class Replica:
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)  # conversation -> tokens of it
    cached_tokens: int = 0
    is_busy: bool = False

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        request.uncached = request.prompt - min(self.cache.get(request.conversation, 0), request.prompt - 1)
        request.left = request.answer
        self.waiting.append(request)

    def step(self, speed: Speed) -> tuple[float, list[Request], list[Request]]:
        """Seconds that it takes, who gets the first token by it, and who the last."""
        while self.waiting and len(self.running) < MOST_RUNNING:
            self.running.append(self.waiting.popleft())
        room, rows, first, done = STEP_TOKENS, 0, [], []
        for request in self.running:
            if request.uncached:
                taken = min(room, request.uncached)
                request.uncached -= taken
                room -= taken
                if request.uncached:
                    continue
                first.append(request)
            rows += 1
            request.left -= 1
            if request.left == 0:
                done.append(request)
        self.running = [request for request in self.running if request.left]
        for request in done:
            self.remember(request.conversation, request.prompt + request.answer)
        return speed.seconds(rows, STEP_TOKENS - room), first, done

    def remember(self, conversation: int, tokens: int) -> None:
        self.cached_tokens -= self.cache.pop(conversation, 0)
        self.cache[conversation] = tokens
        self.cached_tokens += tokens
        while self.cached_tokens > CACHE_TOKENS and len(self.cache) > 1:
            self.cached_tokens -= self.cache.popitem(last=False)[1]


Router = Callable[[random.Random, list[Replica], dict[int, int], Request], int]


def fewest(draw: random.Random, replicas: list[Replica]) -> int:
    """Of the replicas the one with the fewest requests; of many, the better of some that are drawn."""
    drawn = range(len(replicas)) if len(replicas) <= 16 else draw.sample(range(len(replicas)), 16)
    return min(drawn, key=lambda at: (replicas[at].load, draw.random()))


def by_random(draw: random.Random, replicas: list[Replica], homes: dict[int, int], request: Request) -> int:
    return draw.randrange(len(replicas))


def by_load(draw: random.Random, replicas: list[Replica], homes: dict[int, int], request: Request) -> int:
    return fewest(draw, replicas)


def by_prefix(draw: random.Random, replicas: list[Replica], homes: dict[int, int], request: Request) -> int:
    home, other = homes.get(request.conversation), fewest(draw, replicas)
    if home is None or replicas[home].load > 4 + 2 * replicas[other].load:
        return other
    return home


ROUTERS: dict[str, Router] = {"random": by_random, "least": by_load, "prefix": by_prefix}


@dataclass(frozen=True)
class Outcome:
    """Of one fleet; seconds to the first token, shares, tokens of answers."""

    replicas: int
    load: float
    router: str
    first_token_p50: float
    first_token_p95: float
    cached_share: float  # of the prompts' tokens
    tokens_per_s: float  # of all replicas together
    cost_per_million: float  # answers' tokens


def exponential(draw: random.Random, average: float) -> int:
    return 1 + int(draw.expovariate(1 / average))


def begin(draw: random.Random, rate: float, duration: float) -> Iterator[Request]:
    """The first question of each conversation, `rate` of them a second, also of those that had begun before."""
    now, number = -BEFORE, 0
    while (now := now + draw.expovariate(rate)) < duration:
        turns = exponential(draw, TURNS - 1)
        yield Request(number, SYSTEM + exponential(draw, QUESTION), exponential(draw, ANSWER), turns - 1, now)
        number += 1


def follow(draw: random.Random, request: Request, ended: float) -> Request | None:
    """The next question of its conversation, asked some time after the answer; None if there is none."""
    if not request.turns_left:
        return None
    asked = ended + draw.expovariate(1 / THINKING)
    prompt = request.prompt + request.answer + exponential(draw, QUESTION)
    return Request(request.conversation, prompt, exponential(draw, ANSWER), request.turns_left - 1, asked)


def in_the_midst(
    draw: random.Random, speed: Speed, request: Request, replicas: list[Replica], homes: dict[int, int]
) -> Request | None:
    """The first question after the beginning of a conversation that began before it, held by some replica so far."""
    while request is not None and request.arrived < 0:
        held = request.prompt + request.answer
        request = follow(draw, request, request.arrived + request.answer * speed.seconds(MOST_RUNNING // 2, 0))
        if request is not None:
            home = homes[request.conversation] = draw.randrange(len(replicas))
            replicas[home].remember(request.conversation, held)
    return request


def average_request(draw: random.Random, speed: Speed) -> tuple[float, float]:
    """Seconds of a replica that a conversation takes without a cache, and its turns, by drawing some thousands."""
    taken, turns = 0.0, 0
    for _ in range(5000):
        prompt = SYSTEM
        for _ in range(exponential(draw, TURNS - 1)):
            prompt, answer = prompt + exponential(draw, QUESTION), exponential(draw, ANSWER)
            taken += speed.request_seconds(prompt, answer)
            prompt, turns = prompt + answer, turns + 1
    return taken / 5000, turns / 5000


def simulate(speed: Speed, num_replicas: int, load: float, router: str, duration: float, cost: float) -> Outcome:
    """`cost` is that of a replica's hour."""
    draw = random.Random(0)
    rate = load * num_replicas / average_request(random.Random(1), speed)[0]
    replicas, homes = [Replica() for _ in range(num_replicas)], {}
    events: list[tuple[float, int, object]] = []
    for request in begin(draw, rate, duration):
        request = in_the_midst(draw, speed, request, replicas, homes)
        if request is not None:
            events.append((request.arrived, len(events), request))
    heapq.heapify(events)
    count, first_tokens, prompts, computed, answered = len(events), [], 0, 0, 0
    while events:
        now, _, event = heapq.heappop(events)
        if now > duration:
            break
        counts = now > WARM_UP * duration
        if isinstance(event, Request):
            at = ROUTERS[router](draw, replicas, homes, event)
            homes[event.conversation] = at
            replicas[at].add(event)
            if counts:
                prompts, computed = prompts + event.prompt, computed + event.uncached
            if replicas[at].is_busy:
                continue
        else:
            at = event
        replica = replicas[at]
        replica.is_busy = replica.load > 0
        if not replica.is_busy:
            continue
        taken, first, done = replica.step(speed)
        ends = now + taken
        for request in first:
            if counts:
                first_tokens.append(ends - request.arrived)
        for request in done:
            answered += request.answer * counts
            following = follow(draw, request, ends)
            if following is not None:
                count += 1
                heapq.heappush(events, (following.arrived, count, following))
        count += 1
        heapq.heappush(events, (ends, count, at))
    seconds = (1 - WARM_UP) * duration
    cuts = quantiles(first_tokens, n=20)
    return Outcome(
        num_replicas,
        load,
        router,
        cuts[9],
        cuts[18],
        1 - computed / prompts,
        answered / seconds,
        1e6 * num_replicas * cost * (seconds / 3600) / answered,
    )


def draw_plot(path: Path, outcomes: list[Outcome]) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 4.5), layout="constrained")
    by_load_axes, by_size_axes = canvas.subplots(1, 2)
    for router in ROUTERS:
        own = [one for one in outcomes if one.router == router and one.replicas == MIDDLE]
        by_load_axes.plot([one.load for one in own], [one.first_token_p95 for one in own], marker="o", label=router)
        own = [one for one in outcomes if one.router == router and one.load == FULL]
        by_size_axes.plot([one.replicas for one in own], [one.first_token_p95 for one in own], marker="o", label=router)
    by_load_axes.set(xlabel="load", ylabel="seconds to the first token, p95", yscale="log", title=f"{MIDDLE} replicas")
    by_size_axes.set(xlabel="replicas", xscale="log", yscale="log", title=f"load {FULL:g}")
    for axes in (by_load_axes, by_size_axes):
        axes.legend()
    canvas.savefig(path, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speed", type=Path, help="what `llama bench --json` wrote")
    parser.add_argument("--precision", help="of those in the file; the first if left out")
    parser.add_argument("--seconds", type=float, default=300, help="that are simulated")
    parser.add_argument("--cost", type=float, default=0.10, help="of a replica's hour, in any currency")
    parser.add_argument("--replicas", type=int, nargs="+", default=list(REPLICAS))
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    speed = Speed.measured(options.speed, options.precision)
    print(f"a step takes {1e3 * speed.base:.1f} ms, {1e3 * speed.row:.2f} a request, {1e3 * speed.prompt:.3f} a token")
    fleets = [
        (speed, replicas, load, router, options.seconds, options.cost)
        for replicas in options.replicas
        for load in (LOADS if replicas <= LARGE else (FULL,))
        for router in ROUTERS
    ]
    with ProcessPoolExecutor(options.workers) as workers:
        outcomes = []
        for one in workers.map(simulate, *zip(*fleets, strict=True)):
            outcomes.append(one)
            print(
                f"{one.replicas:5} replicas  load {one.load:4.2f}  {one.router:7}  "
                f"first token {one.first_token_p50:7.2f} s, p95 {one.first_token_p95:8.2f} s  "
                f"{one.cached_share:4.0%} cached  {one.tokens_per_s:9.0f} tokens/s  "
                f"{one.cost_per_million:6.2f} a million",
                flush=True,
            )
    if options.plot:
        draw_plot(options.plot, outcomes)
    report({"speed": vars(speed), "outcomes": [vars(one) for one in outcomes]})


if __name__ == "__main__":
    main()
