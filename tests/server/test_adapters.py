"""Adapters over HTTP: each is a model that clients may name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.adapter_files import save_adapter
from support.server import Running, serving, tiny_llm

from llama import Llama, SamplingParams
from llama.answer import Query
from llama.server.metrics import Metrics

PROMPT = [256, *b"a prompt"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
BODY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate("ab"):
        save_adapter(folder / name, seed)
    return folder


def adapted(folder: Path, *names: str) -> Llama:
    llm = tiny_llm()
    for name in names:
        llm.load_adapter(name, folder / name)
    return llm


@pytest.fixture(scope="module")
def expected(folder) -> dict[str | None, list[int]]:
    """The answer to PROMPT by adapter."""
    llm = adapted(folder, "a", "b")
    found = {name: llm.complete([PROMPT], GREEDY, name)[0].tokens for name in (None, "a", "b")}
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    return found


@pytest.fixture(scope="module")
def adapting(folder) -> Iterator[Running]:
    with serving(lambda: adapted(folder, "a", "b"), ollama=True, name="base") as running:
        yield running


def answer(running: Running, model: str, **more) -> list[int]:
    status, said = running.post("/v1/completions", {**BODY, "model": model, **more})
    assert status == 200, said
    assert said["model"] == model
    return said["choices"][0]["token_ids"]


def test_a_model_s_name_chooses_an_adapter(adapting, expected):
    for name, tokens in (("a", expected["a"]), ("b", expected["b"]), ("base", expected[None]), ("x", expected[None])):
        assert answer(adapting, name) == tokens


MESSAGES = [{"role": "user", "content": "Hello"}]
CALLS = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True},
    "/v1/embeddings": {"input": "Hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8, "temperature": 0},
    "/generate": {"history": [{"role": "Human", "content": "Hello"}], "temperature": 0, "max_new_tokens": 8},
    "/api/chat": {"messages": MESSAGES, "stream": False, "options": {"temperature": 0, "num_predict": 8}},
    "/api/generate": {"prompt": "Hello", "stream": False, "options": {"temperature": 0, "num_predict": 8}},
    "/api/embed": {"input": "Hello"},
}


def said(running: Running, path: str, model: str) -> str:
    """An answer's content, wherever its wire has it."""
    status, body = running.post(path, {**CALLS[path], "model": model})
    assert status == 200, body
    kept = ("choices", "data", "content", "response", "message", "embeddings")
    return str({key: body[key] for key in kept if key in body})


@pytest.mark.parametrize("path", CALLS)
def test_every_wire_s_model_may_be_an_adapter(adapting, path):
    answers = {name: said(adapting, path, name) for name in ("base", "a", "b")}
    assert len(set(answers.values())) == 3, answers
    assert said(adapting, path, "other") == answers["base"]


def test_adapters_are_listed_with_the_model_that_they_belong_to(adapting):
    listed = adapting.get("/v1/models")[1]["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in listed] == [
        ("base", "base", None),
        ("a", "a", "base"),
        ("b", "b", "base"),
    ]
    assert adapting.get("/v1/models/a")[1] == listed[1]
    tags = adapting.get("/api/tags")[1]["models"]
    assert [(one["name"], one["details"]["parent_model"]) for one in tags] == [
        ("base", ""),
        ("a", "base"),
        ("b", "base"),
    ]


def test_a_strict_server_knows_the_names_of_its_adapters(folder):
    with serving(lambda: adapted(folder, "a"), strict_model=True, name="base") as running:
        assert running.post("/v1/completions", {**BODY, "model": "a"})[0] == 200
        status, refused = running.post("/v1/completions", {**BODY, "model": "b"})
        assert (status, refused["error"]["message"]) == (404, "the model 'b' is not served: give base or a")


def test_a_monitor_sees_which_adapters_are_at_work(folder):
    llm, metrics = adapted(folder, "a", "b"), Metrics()
    metrics.watch(llm, "base", 128)
    for name in ("b", "a", None):
        llm.engine.add(Query(PROMPT, GREEDY.resolve(), adapter=name))

    def told() -> str:
        [line] = [line for line in metrics.text().decode().splitlines() if line.startswith("vllm:lora_requests_info{")]
        return line

    assert 'max_lora="128",model_name="base",running_lora_adapters="",waiting_lora_adapters="a,b"' in told()
    llm.engine.step()
    assert 'running_lora_adapters="a,b",waiting_lora_adapters=""' in told()
