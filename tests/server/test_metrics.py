import asyncio
from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

import llama.server.metrics
from llama.answer import Completion, Event
from llama.engine import EngineStats
from llama.server.metrics import SECONDS, Metrics

IDLE = dict.fromkeys((field.name for field in fields(EngineStats)), 0) | {"num_blocks": 10}


def token(request_id, index=0, end=None):
    completion = end and Completion("", [], end)
    return Event(request_id, index, None if end in ("stop", "abort") else 7, completion=completion)


@pytest.fixture
def clock(monkeypatch):
    """The time that metrics see; it stands until it is set."""
    clock = [0.0]
    monkeypatch.setattr(llama.server.metrics.time, "monotonic", lambda: clock[0])
    return clock


def samples(metrics):
    """By name and labels but for those that all have."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0")
            found[sample.name, *labels.values()] = sample.value
    return found


def test_gauges_and_counters_stand_under_our_names_and_vllm_s():
    metrics = Metrics("tiny", 16)
    metrics.num_queued = 2
    stats = EngineStats(
        **IDLE
        | dict(num_running=3, num_waiting=4, num_referenced_blocks=5, num_preemptions=6, num_prompt_tokens=7)
        | dict(num_generated_tokens=8, num_queried_tokens=9, num_hit_tokens=1)
    )
    metrics.step(stats, [])
    found = samples(metrics)
    for prefix in ("llama_", "vllm:"):
        assert found[f"{prefix}num_requests_running",] == 3
        assert found[f"{prefix}num_requests_waiting",] == 6
        assert found[f"{prefix}kv_cache_usage_perc",] == 0.5
        assert found[f"{prefix}num_preemptions_total",] == 6
        assert found[f"{prefix}prompt_tokens_total",] == 7
        assert found[f"{prefix}generation_tokens_total",] == 8
        assert found[f"{prefix}prefix_cache_queries_total",] == 9
        assert found[f"{prefix}prefix_cache_hits_total",] == 1
    assert found["vllm:cache_config_info", "16", "10"] == 1


def test_latencies_are_those_of_each_answer(clock):
    metrics, stats = Metrics("tiny", 16), EngineStats(**IDLE)
    metrics.begin(5, num_choices=2, asked=0.0)
    for clock[0], events in [
        (2.0, [token(5, 0), token(5, 1)]),
        (3.0, [token(5, 0), token(8)]),  # nobody began 8: it is somebody else's
        (5.0, [token(5, 0, end="length"), token(5, 1, end="stop")]),
    ]:
        metrics.step(stats, events)
    found = samples(metrics)
    for prefix, whole in (("llama_", "request_latency"), ("vllm:", "e2e_request_latency")):
        assert found[f"{prefix}time_to_first_token_seconds_count",] == 2
        assert found[f"{prefix}time_to_first_token_seconds_sum",] == 4
        assert found[f"{prefix}inter_token_latency_seconds_count",] == 2
        assert found[f"{prefix}inter_token_latency_seconds_sum",] == 3
        assert found[f"{prefix}{whole}_seconds_sum",] == 10
        assert found[f"{prefix}request_success_total", "length"] == 1
        assert found[f"{prefix}request_success_total", "stop"] == 1


def test_a_histogram_counts_up_to_each_of_its_bounds(clock):
    metrics = Metrics("tiny", 16)
    for seconds in (0.001, 0.0011, 601):
        metrics.first_token.observe(seconds)
    found = samples(metrics)
    buckets = {bound: found["llama_time_to_first_token_seconds_bucket", bound] for bound in map(str, SECONDS)}
    assert (buckets["0.001"], buckets["0.0025"], buckets["600.0"]) == (1, 2, 2)
    assert found["llama_time_to_first_token_seconds_bucket", "+Inf"] == 3


def test_an_ended_request_is_forgotten(clock):
    metrics = Metrics("tiny", 16)
    for end in ("stop", "length", "abort", "error"):
        metrics.begin(1, num_choices=1, asked=0.0)
        metrics.step(EngineStats(**IDLE), [token(1, end=end)])
    assert metrics._times == {}
    assert samples(metrics)["llama_aborted_total",] == 1


def test_answers_are_counted_by_status():
    metrics = Metrics("tiny", 16)
    for status in (200, 200, 429):
        metrics.answer(status)
    metrics.num_refused += 1
    found = samples(metrics)
    assert (found["llama_http_responses_total", "200"], found["llama_http_responses_total", "429"]) == (2, 1)
    assert found["llama_refused_total",] == 1


def test_before_the_first_step_there_is_text_too():
    assert ("llama_num_requests_running",) not in samples(Metrics("tiny", 16))


def test_the_event_loop_is_watched(monkeypatch):
    monkeypatch.setattr(llama.server.metrics, "LAG_PERIOD", 0)
    metrics = Metrics("tiny", 16)

    async def watch():
        task = asyncio.create_task(metrics.watch_loop())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(watch())
    assert samples(metrics)["llama_event_loop_lag_seconds_count",] > 5
