"""Ollama's own package, with nothing changed but its host."""

from collections.abc import Iterator

import ollama
import pytest
from support.server import Running, serving

USER = {"role": "user", "content": "hi"}
GREEDY = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(ollama=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> ollama.Client:
    with ollama.Client(host=running.url) as client:
        yield client


def test_a_stream_adds_up_to_the_answer(client):
    asked = dict(model="m", messages=[USER], options=GREEDY)
    whole = client.chat(**asked)
    *pieces, last = client.chat(**asked, stream=True)
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert (last.done_reason, last.eval_count) == (whole.done_reason, whole.eval_count) == ("length", 12)
    assert client.generate(model="m", prompt="hi", options=GREEDY).response == whole.message.content


def test_asking_for_nothing_loads_the_model(client):
    [line] = client.generate(model="m", stream=True)
    assert (line.done, line.done_reason) == (True, "load")


def test_texts_become_vectors(client, running):
    [vector] = client.embed(model="m", input="one").embeddings
    assert vector == pytest.approx(running.server.llm.embed(["one"])[0].tolist(), abs=1e-5)


def test_models_are_listed_and_shown(client, running):
    [listed], [loaded] = client.list().models, client.ps().models
    assert listed.model == loaded.model == running.server.model.name
    assert (listed.size, loaded.context_length) == (loaded.size, 256)
    shown = client.show(listed.model)
    assert shown.modelinfo["llama.context_length"] == 256
    assert "completion" in shown.capabilities


def test_errors_are_those_that_the_client_knows(client):
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match=r"^tools holds ") as caught:
            list(client.chat(model="m", messages=[USER], tools=[{"type": "function"}], stream=stream))
        assert caught.value.status_code == 400


def test_its_own_command_finds_the_server(running):
    assert running.open("HEAD", "/").status == 200
    assert running.get("/api/version") == (200, {"version": "0.18.3"})


def test_without_the_setting_nothing_looks_like_ollama():
    with serving() as plain:
        status, body = plain.get("/api/version")
        assert (status, body.keys()) == (404, {"error"})
        assert plain.post("/api/chat", {"model": "m", "messages": [USER]})[0] == 404
