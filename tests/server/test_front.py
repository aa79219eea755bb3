"""What stands before replicas, and a replica itself, with replicas in this process: nothing here needs Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from support.asgi import Answer, scope
from support.loops import run_async
from support.server import tiny_llm

from llama import SamplingParams
from llama.server.front import MOST_TRIES, Front, ReplicaLost, merge_metrics
from llama.server.replica import Forwarded, Replica
from llama.server.run import surrounded
from llama.server.settings import ServerSettings

PROMPT = {"model": "m", "prompt": "hello", "max_tokens": 6, "temperature": 0}


class NearFleet:
    """Replicas in this process. `losses`: after how many rounds of messages each of the next answers breaks off."""

    def __init__(self, settings: ServerSettings, num_replicas: int = 2):
        self.replicas = [Replica(tiny_llm, settings, engine=str(number)) for number in range(num_replicas)]
        self.asked: list[Forwarded] = []
        self.losses: list[int] = []
        self.is_closed = False
        self.lost = asyncio.Event()

    async def start(self) -> str:
        for replica in self.replicas:
            await replica.start()
        return await self.replicas[0].name()

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[dict[str, Any]]]:
        self.asked.append(request)
        rounds = self.replicas[len(self.asked) % len(self.replicas)].answer(request)
        most = self.losses.pop(0) if self.losses else None
        try:
            while most != 0:
                try:
                    messages = await anext(rounds)
                except StopAsyncIteration:
                    return
                yield messages
                most = most and most - 1
        finally:
            await rounds.aclose()
        raise ReplicaLost("it was killed")

    async def ask(self, method: str, *args: Any) -> list[Any]:
        return [await getattr(replica, method)(*args) for replica in self.replicas]

    async def watch(self) -> None:
        await self.lost.wait()
        raise RuntimeError("the cluster has ended")

    async def close(self) -> None:
        self.is_closed = True


async def ask(front: Front, path: str, body: Any = None, method: str = "POST", leaves: bool = False) -> Answer:
    """The answer to one request."""
    answer, is_read, begun = Answer(), False, asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal is_read
        if is_read:
            await (begun if leaves else asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        is_read = True
        return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        answer.messages.append(message)
        begun.set()

    given = {"content-type": "application/json"}
    state = {"key": None, "is_admin": False, "request_id": "r"}
    await front(scope(method, path, given, state=state), receive, send)
    return answer


def fronted(
    use: Callable[[Front, NearFleet], Coroutine[Any, Any, Any]], is_started: bool = True, **settings: Any
) -> Any:
    """What `use` returns of a front that has started."""

    async def run() -> Any:
        given = ServerSettings(**{"quiet": True, **settings})
        fleet = NearFleet(given)
        front = Front(fleet, given)
        if is_started:
            await front.start()
        try:
            return await use(front, fleet)
        finally:
            await front.close()
            for replica in fleet.replicas if is_started else ():
                await replica.close()
            assert fleet.is_closed

    return run_async(run())


def test_an_answer_is_that_of_a_replica():
    async def use(front, fleet):
        return await ask(front, "/v1/completions", PROMPT), await ask(front, "/v1/models", method="GET")

    answer, models = fronted(use)
    [expected] = tiny_llm().complete(["hello"], SamplingParams(temperature=0, max_tokens=6))
    assert answer.status == 200
    assert json.loads(answer.body)["choices"][0]["text"] == expected.text
    assert [model["id"] for model in json.loads(models.body)["data"]] == ["model"]


def test_a_stream_comes_as_a_replica_sends_it():
    async def use(front, fleet):
        return await ask(front, "/v1/completions", PROMPT | {"stream": True})

    answer = fronted(use)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert len(answer.messages) > 3
    assert not answer.messages[-1]["more_body"]


def test_a_request_whose_replica_is_lost_before_it_answers_goes_to_another(monkeypatch):
    told = []
    monkeypatch.setattr("llama.server.front.tell", told.append)

    async def use(front, fleet):
        fleet.losses = [0, 0]
        return await ask(front, "/v1/completions", PROMPT), len(fleet.asked)

    answer, num_asked = fronted(use)
    assert (answer.status, num_asked) == (200, 3)
    assert told == ["llama: warning: a replica was lost while it answered: it was killed"] * 2


def test_a_request_over_which_replica_after_replica_is_lost_is_refused():
    async def use(front, fleet):
        fleet.losses = [0] * 9
        return await ask(front, "/v1/completions", PROMPT), len(fleet.asked)

    answer, num_asked = fronted(use)
    assert (answer.status, num_asked) == (503, MOST_TRIES)
    assert answer.headers["retry-after"]
    assert "replicas were lost over this request" in answer.error["message"]


def test_a_stream_whose_replica_is_lost_does_not_look_finished():
    async def use(front, fleet):
        fleet.losses = [1]
        with pytest.raises(ConnectionAbortedError, match="the rest of the answer"):
            await ask(front, "/v1/completions", PROMPT | {"stream": True, "max_tokens": 200, "ignore_eos": True})
        return len(fleet.asked)

    assert fronted(use) == 1


def test_a_client_that_leaves_ends_its_request_at_the_replica():
    async def use(front, fleet):
        answer = await ask(
            front, "/v1/completions", PROMPT | {"stream": True, "max_tokens": 200, "ignore_eos": True}, leaves=True
        )
        return answer, [len(replica._server.engine.streams) for replica in fleet.replicas]

    answer, num_streams = fronted(use)
    assert b"[DONE]" not in answer.body
    assert num_streams == [0, 0]


def test_what_a_replica_refuses_is_refused():
    async def use(front, fleet):
        return await ask(front, "/v1/completions", PROMPT | {"wrong": 1}), await ask(front, "/nowhere", method="GET")

    wrong, nowhere = fronted(use)
    assert (wrong.status, nowhere.status) == (400, 404)
    assert "wrong" in wrong.error["message"]


def test_a_request_brings_its_beginning_and_its_key():
    async def use(front, fleet):
        await ask(front, "/v1/completions", PROMPT | {"prompt": "a ship " * 100})
        return fleet.asked

    [request] = fronted(use, max_body=100_000)
    assert len(request.begins) == 2
    assert request.scope["state"]["key"] is None
    assert "extensions" not in request.scope


def test_health_says_whether_requests_are_taken():
    async def use(front, fleet):
        started = await ask(front, "/health", method="GET")
        front.is_draining = True
        return started, await ask(front, "/health", method="GET"), await ask(front, "/v1/completions", PROMPT)

    started, stopping, refused = fronted(use)
    assert (started.status, stopping.status, refused.status) == (200, 503, 503)
    assert json.loads(started.body) == {"status": "ok"}
    assert refused.error["message"] == "the server is stopping"


def test_who_asks_before_the_replicas_are_there_is_told():
    async def use(front, fleet):
        return await ask(front, "/health", method="GET"), await ask(front, "/metrics", method="GET")

    health, metrics = fronted(use, is_started=False)
    assert (health.status, metrics.status) == (503, 200)
    assert health.error["message"] == "the replicas are starting"


def test_an_application_server_may_begin_and_end_it():
    async def use(front, fleet):
        told: list[dict[str, Any]] = []
        ending = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if told:
                await ending.wait()
            return {"type": "lifespan.shutdown" if told else "lifespan.startup"}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)

        living = asyncio.create_task(surrounded(front, front)({"type": "lifespan"}, receive, send))
        while not told:
            await asyncio.sleep(0)
        health = await ask(front, "/health", method="GET")
        ending.set()
        await living
        for replica in fleet.replicas:
            await replica.close()
        return health.status, [message["type"] for message in told], fleet.is_closed

    expected = ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert fronted(use, is_started=False) == (200, expected, True)


def test_an_application_server_is_told_what_kept_replicas_from_starting(monkeypatch):
    async def fail(self: NearFleet) -> str:
        raise RuntimeError("there is no room")

    async def use(front, fleet):
        told: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "lifespan.startup"}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)

        await front({"type": "lifespan"}, receive, send)
        return told

    monkeypatch.setattr(NearFleet, "start", fail)
    assert fronted(use, is_started=False) == [{"type": "lifespan.startup.failed", "message": "there is no room"}]


def test_streams_that_are_cut_off_by_a_stop_are_told():
    async def use(front, fleet):
        asking = asyncio.create_task(
            ask(front, "/v1/completions", PROMPT | {"stream": True, "max_tokens": 240, "ignore_eos": True})
        )
        while not any(replica._server.engine.streams for replica in fleet.replicas):
            await asyncio.sleep(0)
        front.is_draining = True
        front.fail("the server is stopping")
        return await asking

    answer = fronted(use)
    assert b"the server is stopping" in answer.body


def test_a_front_ends_with_the_cluster_of_its_replicas():
    async def use(front, fleet):
        assert not front.ended.done()
        fleet.lost.set()
        return await asyncio.gather(front.ended, return_exceptions=True)

    [error] = fronted(use)
    assert str(error) == "the cluster has ended"


def test_the_metrics_of_all_stand_at_one_address_under_their_numbers():
    async def use(front, fleet):
        for _ in range(2):
            await ask(front, "/v1/completions", PROMPT)
        return await ask(front, "/metrics", method="GET")

    text = fronted(use).body.decode()
    for engine in "01":
        assert f'llama_generation_tokens_total{{engine="{engine}",model_name="model"}} 6.0' in text
    assert 'llama_event_loop_lag_seconds_count{engine="front",model_name="model"}' in text
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len({*heads}) == len(heads)


def test_metrics_are_put_together_by_their_heads():
    one = '# HELP a A\n# TYPE a gauge\na{e="0"} 1\n# HELP b B\n# TYPE b counter\nb{e="0"} 2\n'
    two = one.replace('e="0"', 'e="1"')
    assert merge_metrics([one, two]).splitlines() == [
        *("# HELP a A", "# TYPE a gauge", 'a{e="0"} 1', 'a{e="1"} 1'),
        *("# HELP b B", "# TYPE b counter", 'b{e="0"} 2', 'b{e="1"} 2'),
    ]


def test_a_replica_whose_engine_has_ended_is_ill_and_ends(monkeypatch):
    ended = []
    monkeypatch.setattr("llama.server.replica.end_process", ended.append)
    monkeypatch.setattr("llama.server.replica.LAST_WORDS", 0)

    async def run():
        replica = Replica(tiny_llm, ServerSettings())
        await replica.start()
        await replica.check_health()
        replica._server.engine.stop()
        await replica._server.ended
        with pytest.raises(RuntimeError, match="the engine of this replica has ended"):
            await replica.check_health()
        while not ended:
            await asyncio.sleep(0)

    run_async(run())
    assert "has ended" in str(ended[0])
