"""Another model in the place of the one that is served, while clients ask."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.adapter_files import save_adapter
from support.meta_files import save_meta, save_tokenizer
from support.processes import server_processes
from support.server import Running, Stepwise, serving
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams

PROMPT = [1, 5, 9, 11]
BODY = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
BODY |= {"return_token_ids": True}
ADMIN = {"authorization": "Bearer boss"}
LOAD, UNLOAD = "/v1/internal/model/load", "/v1/internal/model/unload"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models of one shape, one that cannot be built and one that cannot be opened."""
    folder = tmp_path_factory.mktemp("given") / "models"
    args = tiny_args(vocab_size=400, multiple_of=64)
    for seed, name in enumerate(("one", "two")):
        save_meta(folder / name, args, tiny_weights(args, seed))
        save_tokenizer(folder / name / "tokenizer.model")
    save_meta(folder / "untold", args, tiny_weights(args))  # without a tokenizer
    save_meta(folder / "broken", args, tiny_weights(args))
    (folder / "broken" / "consolidated.00.pth").write_bytes(b"no weights")
    save_adapter(folder.parent / "loras" / "a", 1)
    return folder


def make(folder: Path, path: str | None = None, options: Any = None) -> Llama:
    """As `llama serve` builds its models."""
    common = {"max_seq_len": 256, "device": "cpu", "dtype": "fp32"}
    return Llama.build(path or folder / "one", **common | (options or {}))


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    return {name: make(folder, folder / name).complete([PROMPT], params)[0].tokens for name in ("one", "two")}


@pytest.fixture
def running(folder) -> Iterator[Running]:
    loras = folder.parent / "loras"
    with serving(partial(make, folder), model_dir=folder, lora_dir=loras, admin_key="boss") as running:
        yield running


def load(running: Running, name: str, **more) -> tuple[int, Any]:
    return running.post(LOAD, {"model_name": name, **more}, **ADMIN)


def tokens(running: Running, **more) -> list[int]:
    status, said = running.post("/v1/completions", {**BODY, **more})
    assert status == 200, said
    return said["choices"][0]["token_ids"]


def info(running: Running) -> dict[str, Any]:
    return running.get("/v1/internal/model/info")[1]


def test_another_model_answers_and_then_the_first_one_again(running, expected):
    assert running.get("/v1/internal/model/list", **ADMIN)[1] == {"model_names": ["one", "broken", "two", "untold"]}
    assert info(running) == {"model_name": "one", "lora_names": [], "loader": "llama", "loading": None}
    assert tokens(running) == expected["one"]
    for name in ("two", "one", "two"):
        assert load(running, name, args={}, settings={}) == (200, "OK")
        assert info(running)["model_name"] == name
        assert tokens(running) == expected[name]
        assert [one["id"] for one in running.get("/v1/models")[1]["data"] if "parent" in one] == [name]
        assert f'model_name="{name}"' in running.get("/metrics")[1]
    assert running.get("/health")[0] == 200


def test_nothing_is_left_of_a_model_that_another_has_replaced(running):
    running.post("/v1/internal/lora/load", {"lora_names": ["a"]}, **ADMIN)
    tokens(running, lora=[{"id": 0, "scale": 0.5}])
    model = weakref.ref(running.call(lambda: running.server.llm.model))
    assert load(running, "two")[0] == 200
    gc.collect()
    assert model() is None


def test_without_a_model_everything_says_so_until_one_is_loaded(running, expected):
    assert running.post(UNLOAD, {}, **ADMIN) == (200, "OK")
    assert info(running) == {"model_name": None, "lora_names": [], "loader": "llama", "loading": None}
    for status, refused in (
        running.get("/health"),
        running.get("/v1/models"),
        running.get("/slots"),
        running.post("/v1/completions", BODY),
        running.post("/v1/internal/lora/load", {"lora_names": ["a"]}, **ADMIN),
    ):
        assert (status, refused["error"]["code"]) == (503, "unavailable")
        assert refused["error"]["message"].startswith(f"no model is loaded: POST {LOAD} loads one")
    assert running.open("POST", "/v1/completions", BODY).headers["retry-after"] == "1"
    assert running.get("/metrics")[0] == 200
    assert "one" in running.get("/v1/internal/model/list", **ADMIN)[1]["model_names"]
    assert running.post(UNLOAD, {}, **ADMIN) == (200, "OK")
    assert load(running, "two")[0] == 200
    assert tokens(running) == expected["two"]


def test_the_old_model_comes_back_with_its_adapters_where_the_new_one_fails(running, expected):
    running.post("/v1/internal/lora/load", {"lora_names": ["a"]}, **ADMIN)
    adapted = tokens(running)
    assert adapted != expected["one"]
    status, failed = load(running, "untold")
    assert status == 500
    assert failed["error"]["message"].startswith("untold could not be loaded: ")
    assert failed["error"]["message"].endswith("; one is there again")
    assert info(running)["lora_names"] == ["a"]
    assert tokens(running) == adapted
    assert load(running, "two")[0] == 200
    assert info(running)["lora_names"] == []
    assert tokens(running) == expected["two"]


def test_both_errors_are_told_where_the_old_model_is_gone_too(folder, expected):
    models = [make(folder)]

    def once(path: str | None = None, options: Any = None) -> Llama:
        if path is None and not models:
            raise RuntimeError("out of memory")
        return models.pop() if path is None else make(folder, path, options)

    with serving(once, model_dir=folder, admin_key="boss") as running:
        status, failed = load(running, "untold")
        assert status == 500
        assert failed["error"]["message"].startswith("untold could not be loaded: ")
        assert failed["error"]["message"].endswith("; and one could not be loaded again: out of memory")
        assert info(running)["model_name"] is None
        status, failed = load(running, "untold")
        assert failed["error"]["message"].endswith("; no model is loaded")
        assert load(running, "two")[0] == 200
        assert tokens(running) == expected["two"]


WRONG = [
    ({"model_name": "three"}, 404, "no model 'three' can be loaded; there are: one, broken, two, untold"),
    ({"model_name": "../models/two"}, 404, "no model '../models/two' can be loaded"),
    ({"model_name": "broken"}, 400, "broken could not be loaded: "),
    ({"model_name": "two", "args": {"quantization": "int3"}}, 400, "int3"),
    ({"model_name": "two", "args": {"dtype": "int3"}}, 400, "dtype is 'int3': give one of auto, bf16"),
    ({"model_name": "two", "args": {"chat_format": "/etc/passwd"}}, 400, "chat_format is '/etc/passwd': give one of"),
    ({"model_name": "two", "args": {"tokenizer_path": "x"}}, 400, "args.tokenizer_path"),
    ({"model_name": "two", "args": {"lora": ["../models"]}}, 400, "leads out of the folder of adapters"),
    ({"model_name": "two", "settings": {"x": 1}}, 400, "settings: this is not served"),
    ({}, 400, "model_name: Field required"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG)
def test_what_cannot_be_loaded_is_refused_while_the_old_model_answers(running, body, status, message):
    model = running.call(lambda: running.server.model)
    found, refused = running.post(LOAD, body, **ADMIN)
    assert (found, message in refused["error"]["message"]) == (status, True), refused
    assert running.call(lambda: running.server.model) is model


def test_a_model_is_loaded_as_args_say(running):
    args = {"ctx_size": 128, "load_in_4bit": True, "cpu": True, "chat_format": "alpaca", "lora": ["a"], "loader": "x"}
    assert load(running, "two", args=args)[0] == 200
    llm = running.server.llm
    assert (llm.max_seq_len, llm.quantization, llm.chat_format.name) == (128, "sym_int4", "alpaca")
    assert running.post(LOAD, {"model_name": "two"}, **ADMIN)[0] == 200
    assert running.server.llm.quantization is None


def test_only_the_admin_switches(running):
    model = running.call(lambda: running.server.model)
    answers = [running.post(path, {"model_name": "two"}) for path in (LOAD, UNLOAD)]
    for status, refused in answers:
        assert (status, refused["error"]["code"]) == (403, "admin_key_needed")
    assert running.call(lambda: running.server.model) is model


# ---- while requests are at work


def stepping(folder: Path, steps: list[Stepwise], path: str | None = None, options: Any = None) -> Llama:
    llm = make(folder, path, options)
    steps.append(Stepwise(llm))
    return llm


def test_what_is_being_answered_comes_to_its_end_and_nobody_else_is_let_in(folder, expected):
    steps: list[Stepwise] = []
    with serving(partial(stepping, folder, steps), model_dir=folder, admin_key="boss") as running:
        steps[0].allow(2)
        stream = running.open("POST", "/v1/completions", {**BODY, "stream": True})
        first = stream.readline()
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load, running, "two")
            running.wait_until(lambda: running.server.loading == "two")
            for status, refused in (running.get("/health"), running.post("/v1/completions", BODY)):
                assert (status, refused["error"]["message"]) == (503, "Loading model two")
            assert info(running)["loading"] == "two"
            assert not loading.done()
            steps[0].allow()
            lines = (first + stream.read()).split(b"\n\n")
            found = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
            assert [token for frame in found for token in frame["choices"][0]["token_ids"]] == expected["one"]
            assert loading.result() == (200, "OK")
        steps[1].allow()
        assert tokens(running) == expected["two"]


def test_what_takes_too_long_is_cut_off_with_an_error(folder, expected):
    steps: list[Stepwise] = []
    make_one = partial(stepping, folder, steps)
    with serving(make_one, model_dir=folder, admin_key="boss", shutdown_timeout=0) as running:
        steps[0].allow(2)
        stream = running.open("POST", "/v1/completions", {**BODY, "stream": True})
        stream.readline()
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(running.post, "/v1/completions", BODY)
            running.wait_until(lambda: len(running.server.engine.streams) == 2)
            assert load(running, "two") == (200, "OK")
            *_, error, done, _ = stream.read().split(b"\n\n")
            assert json.loads(error[6:])["error"]["code"] == "unavailable"
            assert done == b"data: [DONE]"
            assert whole.result()[0] == 503
        steps[1].allow()
        assert tokens(running) == expected["two"]


def test_a_request_that_was_being_prepared_for_the_old_model_never_meets_the_new_one(running, monkeypatch, expected):
    is_opening, may_go_on = threading.Event(), threading.Event()
    opened = running.server._open

    def opening(*args):
        call = opened(*args)
        is_opening.set()
        assert may_go_on.wait(60)
        return call

    monkeypatch.setattr(running.server, "_open", opening)
    object.__setattr__(running.server.settings, "shutdown_timeout", 0.0)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(running.post, "/v1/completions", BODY)
        assert is_opening.wait(60)
        assert load(running, "two") == (200, "OK")
        may_go_on.set()
        assert asking.result()[0] == 503
    assert tokens(running) == expected["two"]


def test_ranks_switch_together(folder, expected):
    with server_processes(partial(make, folder), 2, model_dir=folder, admin_key="boss") as ranks:

        def post(path: str, body: Any) -> tuple[int, Any]:
            connection = ranks.connection()
            headers = {"content-type": "application/json", "x-api-key": "boss"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        assert post(LOAD, {"model_name": "two"}) == (200, "OK")
        assert post("/v1/completions", BODY)[1]["choices"][0]["token_ids"] == expected["two"]
        assert post(UNLOAD, {}) == (200, "OK")
        assert post("/v1/completions", BODY)[0] == 503
        status, failed = post(LOAD, {"model_name": "untold"})
        assert (status, failed["error"]["message"].endswith("; no model is loaded")) == (500, True)
        assert post(LOAD, {"model_name": "one"}) == (200, "OK")
        assert post("/v1/completions", BODY)[1]["choices"][0]["token_ids"] == expected["one"]
