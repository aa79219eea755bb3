"""Two replicas on Ray under the openai client; one is killed; and all of them end. They share one cluster."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from os import kill
from threading import Event
from time import sleep

import httpx
import pytest
from openai import APIConnectionError, APIError, OpenAI
from support.processes import free_port
from support.replicas import READY, Command, command, listening, save_replicated_model, wait_for_end

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = {"max_tokens": 1500, "temperature": 0, "extra_body": {"ignore_eos": True}}


@dataclass
class Served:
    command: Command
    url: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=300)

    def hits(self) -> dict[str, float]:
        """Tokens of prompts that each replica found in its cache, by its number."""
        text = httpx.get(f"{self.url}/metrics", headers={"authorization": "Bearer key"}, timeout=60).text
        found = re.findall(r'llama_prefix_cache_hits_total\{engine="(\d+)",model_name="tiny"\} ([\d.]+)', text)
        return {engine: float(count) for engine, count in found}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    model = save_replicated_model(tmp_path_factory.mktemp("replicas"))
    flags = (
        "--port",
        0,
        "--name",
        "tiny",
        "--api-key",
        "key",
        "--chat-format",
        "llama2",
        "--quiet",
        "--shutdown-timeout",
        200,
    )
    with command("serve", model, "--replicas", 2, *flags) as running:
        yield Served(running, running.read_until(READY)[1])


def stream(client: OpenAI, prompt: str, begun: Event) -> str:
    """How a stream ended: its reason to finish, or "broken"."""
    try:
        for chunk in client.completions.create(model="tiny", prompt=prompt, stream=True, **LONG):
            begun.set()
            reason = chunk.choices[0].finish_reason
        return reason
    except (APIConnectionError, APIError, httpx.RemoteProtocolError):
        return "broken"


def test_the_openai_client_is_answered(served):
    messages = [{"role": "user", "content": "hello"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = served.client.chat.completions.create(**options)
    chunks = served.client.chat.completions.create(**options, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert whole.usage.completion_tokens == 8
    assert "".join(pieces) == whole.choices[0].message.content
    assert served.client.completions.create(model="tiny", prompt="a", max_tokens=3).usage.completion_tokens <= 3
    assert len(served.client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2
    assert [model.id for model in served.client.models.list()] == ["tiny"]


def test_nothing_but_one_port_of_each_replica_listens_on_other_addresses_than_the_loopback(served):
    replicas = served.command.replicas
    others = [str(address) for address in listening(served.command.family) if not address.is_loopback]
    assert others == ["::"] * 2  # Serve's own between deployments
    assert [str(address) for address in listening(replicas) if not address.is_loopback] == others


def test_a_key_is_asked_for_and_health_is_not_a_secret(served):
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_requests_that_begin_alike_find_their_beginning_in_the_cache(served):
    before = served.hits()
    assert sorted(before) == ["0", "1"]
    for dialog in range(4):
        beginning = f"Dialog {dialog} tells of many ships. " * 20
        for turn in range(4):
            prompt = beginning + "And then. " * turn
            usage = served.client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage
    after = served.hits()
    assert all(after[engine] > before[engine] for engine in "01")
    tokens = sum(after.values()) - sum(before.values())
    assert tokens > 4 * 3 * (usage.prompt_tokens - 100)  # all but each dialog's first turn, and what is new in a turn


def test_no_request_that_had_not_begun_is_lost_with_a_replica(served):
    client, replicas = served.client, served.command.replicas
    assert len(replicas) == 2
    begun = [Event() for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream, client, f"stream {number}", begun[number]) for number in range(4)]
        options = {"model": "tiny", "max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}
        assert all(event.wait(120) for event in begun)
        wholes = [pool.submit(client.completions.create, prompt=f"whole {number}", **options) for number in range(8)]
        kill(replicas[0], signal.SIGKILL)
        assert [whole.result().usage.completion_tokens for whole in wholes] == [100] * 8
        assert {ended.result() for ended in streams} == {"broken", "length"}
    while len(served.hits()) < 2:  # the lost one is replaced
        sleep(0.5)
    assert replicas[0] not in served.command.replicas


def test_a_stop_lets_streams_end_and_leaves_no_process_behind(served):
    family, begun = served.command.family, [Event() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, served.client, f"last {place}", begun[place]) for place in (0, 1)]
        assert all(event.wait(120) for event in begun)
        kill(served.command.process.pid, signal.SIGTERM)
        while httpx.get(f"{served.url}/health").status_code == 200:
            sleep(0.01)
        headers = {"authorization": "Bearer key"}
        refused = httpx.post(f"{served.url}/v1/completions", headers=headers, json={"prompt": "a"})
        assert (refused.status_code, json.loads(refused.text)["error"]["message"]) == (503, "the server is stopping")
        wait(streams)
    assert [one.result() for one in streams] == ["length"] * 2
    assert served.command.process.wait(120) == 0
    assert wait_for_end(family, 30) == []
    assert "Traceback" not in served.command.read_all()


def test_the_application_of_kuberay_answers_behind_the_proxy_of_serve(tmp_path):
    from ray import serve

    from llama.cluster import cluster
    from llama.server.application import application

    model = save_replicated_model(tmp_path)
    arguments = {"model": str(model), "name": "tiny", "chat_format": "llama2", "api_key": ["key"], "quiet": True}
    with cluster(None):
        serve.start(http_options={"port": (port := free_port())})
        serve.run(application(arguments | {"host": "0.0.0.0", "replicas": 1}), name="llama", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        client = OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=300)
        options = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**options)
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
        assert "".join(pieces) == whole.choices[0].text
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        serve.shutdown()
