"""Replicas on a Ray cluster that was there before: what comes to it, what goes from it, and what its end is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from time import sleep

import httpx
import pytest
from support.processes import free_port
from support.replicas import READY, Command, command, save_replicated_model

from llama import Llama, SamplingParams
from llama.cluster import check_reachable

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS = ("--chat-format", "llama2", "--replicas", 2, "--ray-address")
GREEDY = {"max_tokens": 8, "temperature": 0}


@pytest.fixture
def address(monkeypatch) -> str:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.urandom(16).hex())
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # listens on the loopback address alone
    return f"127.0.0.1:{free_port()}"


def head(address: str) -> tuple[object, ...]:
    flags = ("--num-cpus", 2, "--object-store-memory", 200 << 20, "--include-dashboard", "false")
    return "start", "--head", "--block", "--port", address.rpartition(":")[2], *flags


def wait_for_head(address: str, cluster: Command) -> None:
    while cluster.process.poll() is None:
        try:
            return check_reachable(address)
        except RuntimeError:
            sleep(0.2)
    raise AssertionError(cluster.read_all())


def answer(model: Path, running: Command) -> None:
    """Checks the answer of a server against that of a model."""
    url = running.read_until(READY)[1]
    said = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "hello", **GREEDY}, timeout=120).json()
    [expected] = Llama.build(model, chat_format="llama2").complete(["hello"], SamplingParams(**GREEDY))
    assert said["choices"][0]["text"] == expected.text


def test_commands_come_to_a_cluster_leave_it_as_it_was_and_end_with_it(tmp_path, address):
    model = save_replicated_model(tmp_path)
    serving = ("serve", model, "--port", 0, "--quiet", *FLAGS, address)
    with command(*head(address), module="ray.scripts.scripts") as cluster:
        wait_for_head(address, cluster)

        with command(*serving) as first:
            answer(model, first)
            assert len(cluster.replicas) == 2
            first.process.terminate()
            assert first.process.wait(120) == 0
            assert first.read_all().count("\n") == 1, first.told
        assert cluster.replicas == []

        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        body = {"prompt": "hello", **GREEDY}
        source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body}) + "\n")
        with command("batch", source, out, "--model", model, *FLAGS, address) as job:
            assert job.process.wait(300) == 0, job.read_all()
        assert json.loads(out.read_text())["response"]["body"]["usage"]["completion_tokens"] == 8

        with command(*serving) as killed:
            killed.read_until(READY)
            killed.process.kill()
            killed.process.wait()
            with command(*serving) as last:  # needs all processors of the cluster
                answer(model, last)
                assert len(cluster.replicas) == 2
                cluster.process.kill()
                assert last.process.wait(120) == 1
                assert last.read_all().splitlines()[-1] == f"llama: the Ray cluster at {address} has ended"
