"""What a monitor reads at /metrics: how much runs and waits, how long answers take, how the cache is used.

Everything stands there under our own names, and under vLLM's what routers and dashboards look for.
Source: vLLM's documentation, "Metrics"; Prometheus' text format.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llama.answer import Event
from llama.engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")
LAG_PERIOD = 0.1  # seconds between two looks at the event loop
SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)


@dataclass
class Times:
    """When one answer was asked for, and when its last token came."""

    asked: float
    last: float | None = None


class Latency:
    """A histogram of seconds, which stands under several names."""

    def __init__(self, help: str, *names: str):
        self.help = help
        self.names = names
        self.counts = [0] * (len(SECONDS) + 1)  # up to each of SECONDS, and above
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def families(self, labels: dict[str, str]) -> Iterator[Metric]:
        bounds = [*map(str, SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self.counts), strict=True))
        for name in self.names:
            family = HistogramMetricFamily(name, self.help, labels=list(labels))
            family.add_metric(list(labels.values()), buckets, self.total)
            yield family


class Metrics(Collector):
    """What has happened so far. The engine's thread tells it once a step; a scrape reads it in any other.

    Nothing is locked: a scrape may see a step's first half. A token costs one observation.
    """

    def __init__(self, model: str, block_size: int):
        self.labels = {"model_name": model, "engine": "0"}
        self.block_size = block_size
        self.stats: EngineStats | None = None
        self.num_queued = 0  # calls that have not come to the engine yet
        self.num_refused = 0  # because the queue was full
        self.statuses: dict[int, int] = {}
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.first_token = Latency(
            "Until the first token of an answer came",
            "llama_time_to_first_token_seconds",
            "vllm:time_to_first_token_seconds",
        )
        self.inter_token = Latency(
            "Between two tokens of an answer", "llama_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"
        )
        self.whole = Latency(
            "Until an answer was complete", "llama_request_latency_seconds", "vllm:e2e_request_latency_seconds"
        )
        self.lag = Latency("By how much the event loop was late", "llama_event_loop_lag_seconds")
        self._times: dict[tuple[int, int], Times] = {}  # by request id and choice
        self._registry = CollectorRegistry()
        self._registry.register(self)

    # ---- what is told

    def begin(self, request_id: int, num_choices: int, asked: float) -> None:
        """The engine took a request in that was asked for at that time (time.monotonic)."""
        for index in range(num_choices):
            self._times[request_id, index] = Times(asked)

    def step(self, stats: EngineStats, events: Iterable[Event]) -> None:
        """A step's events, which name requests as `begin` did."""
        self.stats = stats
        now = time.monotonic()
        for event in events:
            times = self._times.get((event.request_id, event.index))
            if times is None:
                continue
            if event.token is not None:
                if times.last is None:
                    self.first_token.observe(now - times.asked)
                else:
                    self.inter_token.observe(now - times.last)
                times.last = now
            if event.finish_reason is not None:
                del self._times[event.request_id, event.index]
                self.finished[event.finish_reason] += 1
                self.whole.observe(now - times.asked)

    def answer(self, status: int) -> None:
        """HTTP's status of an answer that is being sent."""
        self.statuses[status] = self.statuses.get(status, 0) + 1

    async def watch_loop(self) -> None:
        """Looks again and again how late the event loop is, for as long as it runs."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            self.lag.observe(max(0.0, loop.time() - due))

    # ---- what is read

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        if self.stats is not None:
            yield from self._engine(self.stats)
        yield self._counter("llama_refused", "Requests refused because the queue was full", self.num_refused)
        yield self._by("llama_http_responses", "Answers by HTTP's status", "status", self.statuses)
        for name in ("llama_request_success", "vllm:request_success"):
            yield self._by(name, "Answers by why they ended", "finished_reason", self.finished)
        yield self._counter("llama_aborted", "Answers that nobody waited for", self.finished["abort"])
        for latency in (self.first_token, self.inter_token, self.whole, self.lag):
            yield from latency.families(self.labels)

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        used = stats.num_referenced_blocks / stats.num_blocks
        gauges = [
            ("num_requests_running", "Requests in the batch", stats.num_running),
            ("num_requests_waiting", "Requests that wait for it", stats.num_waiting + self.num_queued),
            ("kv_cache_usage_perc", "Blocks of the cache that requests hold, of 1", used),
        ]
        counters = [
            ("prompt_tokens", "Tokens of prompts", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens of answers", stats.num_generated_tokens),
            ("num_preemptions", "How often a request gave its blocks to an older one", stats.num_preemptions),
            ("prefix_cache_queries", "Tokens of prompts looked up in the cache", stats.num_queried_tokens),
            ("prefix_cache_hits", "Tokens of prompts found there", stats.num_hit_tokens),
        ]
        for prefix in ("llama_", "vllm:"):
            yield from (self._gauge(prefix + name, help, value) for name, help, value in gauges)
            yield from (self._counter(prefix + name, help, value) for name, help, value in counters)
        sizes = {"block_size": str(self.block_size), "num_gpu_blocks": str(stats.num_blocks)}
        info = GaugeMetricFamily("vllm:cache_config_info", "The cache", labels=[*self.labels, *sizes])
        info.add_metric([*self.labels.values(), *sizes.values()], 1)
        yield info
        yield self._gauge("llama_kv_cache_blocks", "Blocks of the cache", stats.num_blocks)
        yield self._gauge("llama_kv_cache_kept_blocks", "Blocks kept for later prompts", stats.num_cached_blocks)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _by(self, name: str, help: str, label: str, values: dict) -> Metric:
        family = CounterMetricFamily(name, help, labels=[*self.labels, label])
        for key, value in list(values.items()):
            family.add_metric([*self.labels.values(), str(key)], value)
        return family
