"""What a monitor reads at /metrics: how much runs and waits, how long answers take, how the cache is used.

Everything stands there under our own names, and under vLLM's and SGLang's what routers and dashboards look for.
Source: vLLM's documentation, "Metrics"; Prometheus' text format.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llama.answer import Event
from llama.engine import Engine
from llama.generation import Llama
from llama.server.stream import CallStream

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")
LAG_PERIOD = 0.1  # seconds between two looks at the event loop
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


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

    def families(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        bounds = [*map(str, SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self.counts), strict=True))
        for name in self.names:
            family = HistogramMetricFamily(name, self.help, labels=list(labels))
            family.add_metric(list(labels.values()), buckets, self.total)
            yield family


class Metrics(Collector):
    """What has happened so far; all of it belongs to the event loop. A token costs one observation."""

    def __init__(self) -> None:
        self.labels = {"model_name": "", "engine": "0"}
        self.statuses: Counter[int] = Counter()  # answers, by HTTP's status
        self.finished = Counter(dict.fromkeys(FINISH_REASONS, 0))  # answers to prompts, by why they ended
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
        self._llm: Llama | None = None
        self._most_adapters = 0
        self._latest: WeakKeyDictionary[CallStream, dict[tuple[int, int], float]] = WeakKeyDictionary()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    # ---- what is told

    def watch(self, llm: Llama | None, name: str, most_adapters: int = 0) -> None:
        """From now on the model under this name is at work, or none; with so many adapters at a time at the most."""
        self._llm = llm
        self._most_adapters = most_adapters
        self.labels["model_name"] = name

    def step(self, delivery: Sequence[tuple[CallStream, Sequence[Event]]], now: float) -> None:
        """A step's events, at that time of `time.perf_counter`."""
        for stream, events in delivery:
            latest = self._latest.setdefault(stream, {})  # when each of its answers got its latest token
            for event in events:
                key = event.request_id, event.index
                if event.token is not None:
                    if key in latest:
                        self.inter_token.observe(now - latest[key])
                    else:
                        self.first_token.observe(now - stream.opened)
                    latest[key] = now
                if event.finish_reason is not None:
                    self.finished[event.finish_reason] += 1
                    self.whole.observe(now - stream.opened)

    def count(self, status: int) -> None:
        """An answer's HTTP status."""
        self.statuses[status] += 1

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
        if self._llm is not None:
            yield from self._engine(self._llm.engine)
            yield self._adapters(self._llm.engine)
        yield self._by("llama_http_responses", "Answers by HTTP's status", "status", self.statuses)
        for name in ("llama_request_success", "vllm:request_success"):
            yield self._by(name, "Answers to prompts by why they ended", "finished_reason", self.finished)
        yield self._counter("llama_aborted", "Answers that nobody waited for", self.finished["abort"])
        for latency in (self.first_token, self.inter_token, self.whole, self.lag):
            yield from latency.families(self.labels)

    def _engine(self, engine: Engine) -> Iterator[Metric]:
        stats = engine.stats()
        used = stats.num_referenced_blocks / stats.num_blocks
        gauges = [
            ("num_requests_running", "Requests in the batch", stats.num_running),
            ("num_requests_waiting", "Requests that wait for it", stats.num_waiting),
            ("kv_cache_usage_perc", "Blocks of the cache that requests hold, of 1", used),
        ]
        counters = [
            ("prompt_tokens", "Tokens of prompts", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens of answers", stats.num_generated_tokens),
            ("num_preemptions", "How often a request gave its blocks to an older one", stats.num_preemptions),
            ("prefix_cache_queries", "Tokens of prompts looked up in the cache", stats.num_queried_tokens),
            ("prefix_cache_hits", "Tokens of prompts found there", stats.num_hit_tokens),
            ("spec_decode_num_drafts", "How often tokens were guessed ahead", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens that were guessed", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Of those, found right", stats.num_accepted_tokens),
        ]
        for prefix in ("llama_", "vllm:"):
            yield from (self._gauge(prefix + name, help, value) for name, help, value in gauges)
            yield from (self._counter(prefix + name, help, value) for name, help, value in counters)
        of_sglang = {"num_running_reqs": stats.num_running, "num_queue_reqs": stats.num_waiting, "token_usage": used}
        yield from (self._gauge(f"sglang:{name}", "As SGLang has it", value) for name, value in of_sglang.items())
        sizes = {"block_size": str(engine.scheduler.block_size), "num_gpu_blocks": str(stats.num_blocks)}
        yield self._info("vllm:cache_config_info", "The cache", sizes, 1)
        yield self._gauge("llama_kv_cache_blocks", "Blocks of the cache", stats.num_blocks)
        yield self._gauge("llama_kv_cache_kept_blocks", "Blocks kept for later prompts", stats.num_cached_blocks)

    def _adapters(self, engine: Engine) -> Metric:
        """Which adapters are at work: routers send a request to where its adapter is, by the latest of these."""
        running, waiting = (
            ",".join(engine.adapters.names_of(request.group for request in list(requests)))
            for requests in (engine.scheduler.running, engine.scheduler.waiting)
        )
        most = str(self._most_adapters)
        labels = {"max_lora": most, "running_lora_adapters": running, "waiting_lora_adapters": waiting}
        return self._info("vllm:lora_requests_info", "Adapters of requests, at that time", labels, time.time())

    def _info(self, name: str, help: str, labels: Mapping[str, str], value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=[*self.labels, *labels])
        family.add_metric([*self.labels.values(), *labels.values()], value)
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _by(self, name: str, help: str, label: str, counts: Mapping[int, int] | Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, help, labels=[*self.labels, label])
        for key, count in counts.items():
            family.add_metric([*self.labels.values(), str(key)], count)
        return family
