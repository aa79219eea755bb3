import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.loops import run_async
from support.server import Running, serving, tiny_llm

import llama.server.metrics
from llama import SamplingParams
from llama.answer import Completion, Event
from llama.server.metrics import SECONDS, Metrics


class Asked:
    """A stream that was opened at that time."""

    def __init__(self, opened: float):
        self.opened = opened


def token(index=0, end=None):
    completion = end and Completion("", [], end)
    return Event(0, index, None if end in ("stop", "abort") else 7, completion=completion)


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """By name and labels but for those that all have."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("engine") == "0"
            labels.pop("model_name")
            found[sample.name, *labels.values()] = sample.value
    return found


def test_gauges_and_counters_stand_under_our_names_and_vllm_s():
    metrics, llm = Metrics(), tiny_llm()
    metrics.watch(llm, "tiny")
    for _ in range(2):
        llm.complete([[1] * 40], SamplingParams(max_tokens=3))
    llm.engine.speculation.num_drafts, llm.engine.speculation.num_draft_tokens = 2, 9
    llm.engine.speculation.num_accepted_tokens = 5
    found, stats = samples(metrics.text()), llm.engine.stats()
    for prefix in ("llama_", "vllm:"):
        assert found[f"{prefix}num_requests_running",] == 0
        assert found[f"{prefix}num_requests_waiting",] == 0
        assert found[f"{prefix}kv_cache_usage_perc",] == 0
        assert found[f"{prefix}num_preemptions_total",] == 0
        assert found[f"{prefix}prompt_tokens_total",] == 80
        assert found[f"{prefix}generation_tokens_total",] == stats.num_generated_tokens > 0
        assert found[f"{prefix}prefix_cache_queries_total",] == 80
        assert found[f"{prefix}prefix_cache_hits_total",] == 32
        assert found[f"{prefix}spec_decode_num_drafts_total",] == 2
        assert found[f"{prefix}spec_decode_num_draft_tokens_total",] == 9
        assert found[f"{prefix}spec_decode_num_accepted_tokens_total",] == 5
    for name in ("num_running_reqs", "num_queue_reqs", "token_usage"):
        assert found[f"sglang:{name}",] == 0
    assert found["vllm:cache_config_info", "16", str(stats.num_blocks)] == 1
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in metrics.text().decode()


def test_latencies_are_those_of_each_answer():
    metrics, stream = Metrics(), Asked(1.0)
    metrics.step([(stream, [token(0), token(1)])], now=3.0)
    metrics.step([(stream, [token(0)]), (Asked(0.0), [token(0)])], now=4.0)
    metrics.step([(stream, [token(0, end="length"), token(1, end="stop")])], now=6.0)
    found = samples(metrics.text())
    for prefix, whole in (("llama_", "request_latency"), ("vllm:", "e2e_request_latency")):
        assert found[f"{prefix}time_to_first_token_seconds_count",] == 3
        assert found[f"{prefix}time_to_first_token_seconds_sum",] == 2 + 2 + 4
        assert found[f"{prefix}inter_token_latency_seconds_count",] == 2
        assert found[f"{prefix}inter_token_latency_seconds_sum",] == 1 + 2
        assert found[f"{prefix}{whole}_seconds_sum",] == 10
        assert found[f"{prefix}request_success_total", "length"] == 1
        assert found[f"{prefix}request_success_total", "stop"] == 1


def test_a_histogram_counts_up_to_each_of_its_bounds():
    metrics = Metrics()
    for seconds in (0.001, 0.0011, 601):
        metrics.first_token.observe(seconds)
    found = samples(metrics.text())
    buckets = {bound: found["llama_time_to_first_token_seconds_bucket", bound] for bound in map(str, SECONDS)}
    assert (buckets["0.001"], buckets["0.0025"], buckets["600.0"]) == (1, 2, 2)
    assert found["llama_time_to_first_token_seconds_bucket", "+Inf"] == 3


def test_a_stream_that_is_gone_is_forgotten():
    metrics = Metrics()
    metrics.step([(Asked(0.0), [token()])], now=1.0)
    assert len(metrics._latest) == 0


def test_answers_are_counted_by_status():
    metrics = Metrics()
    for status in (200, 200, 429):
        metrics.count(status)
    found = samples(metrics.text())
    assert (found["llama_http_responses_total", "200"], found["llama_http_responses_total", "429"]) == (2, 1)


def test_before_a_model_is_there_there_is_text_too():
    assert ("llama_num_requests_running",) not in samples(Metrics().text())


def test_the_event_loop_is_watched(monkeypatch):
    monkeypatch.setattr(llama.server.metrics, "LAG_PERIOD", 0)
    metrics = Metrics()

    async def watch():
        task = asyncio.create_task(metrics.watch_loop())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()

    run_async(watch())
    assert samples(metrics.text())["llama_event_loop_lag_seconds_count",] > 5


# ---- of a server


@pytest.fixture(scope="module")
def running():
    with serving(name="tiny") as server:
        yield server


def read(running: Running) -> dict[tuple[str, ...], float]:
    response = running.open("GET", "/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(response.read())


def test_a_server_tells_what_it_answered(running):
    before = read(running)
    body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 5, "n": 2, "ignore_eos": True}
    assert running.post("/v1/completions", body)[0] == 200
    assert running.post("/v1/completions", {"model": "m"})[0] == 400
    after = read(running)

    def rise(*name):
        return after[name] - before.get(name, 0)

    assert rise("vllm:prompt_tokens_total") == 3
    assert rise("vllm:generation_tokens_total") == 10
    assert rise("vllm:time_to_first_token_seconds_count") == 2
    assert rise("vllm:inter_token_latency_seconds_count") == 8
    assert rise("vllm:request_success_total", "length") == 2
    assert rise("llama_http_responses_total", "200") == 2  # with the first look at the metrics
    assert rise("llama_http_responses_total", "400") == 1


def test_an_answer_that_nobody_waits_for_is_counted(running):
    before = read(running)
    response = running.open(
        "POST", "/v1/completions", {"model": "m", "prompt": [1], "stream": True, "ignore_eos": True, "n": 2}
    )
    response.read(10)
    response.close()
    running.wait_until_idle()
    assert read(running)["llama_aborted_total",] - before["llama_aborted_total",] == 2
