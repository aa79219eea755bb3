"""Loading and unloading adapters while a server runs, as clients of vLLM, llama.cpp and text-generation-webui do."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path

import pytest
from support.adapter_files import save_adapter
from support.server import Running, Stepwise, serving, tiny_llm

import llama.server.adapters
from llama import Llama, SamplingParams

PROMPT = [256, *range(20, 56)]  # two full blocks
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
BODY = {"model": "base", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
BODY |= {"return_token_ids": True}
ADMIN = {"authorization": "Bearer boss"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given") / "loras"
    for seed, name in enumerate("ab"):
        save_adapter(folder / name, seed)
    save_adapter(folder.parent / "outside", 3)
    (folder / "link").symlink_to(folder.parent / "outside")
    shutil.copytree(folder / "a", folder / "linked weights")
    (folder / "linked weights" / "adapter_model.safetensors").unlink()
    (folder / "linked weights" / "adapter_model.safetensors").symlink_to(
        folder.parent / "outside" / "adapter_model.safetensors"
    )
    save_adapter(folder / "wrong", 4, dim=128)
    (folder / "notes.txt").write_text("no adapter")
    return folder


@pytest.fixture(scope="module")
def plain(folder) -> Llama:
    """A model of the same weights, to compare with."""
    return tiny_llm()


@pytest.fixture(scope="module")
def expected(plain, folder):
    """The answer to PROMPT with some adapters, paths with weights, added up."""

    def answered(*paths: str, **changes) -> list[int]:
        if paths:
            plain.load_adapter("x", [folder / path for path in paths])
        [completion] = plain.complete([PROMPT], SamplingParams(**{**vars(GREEDY), **changes}), "x" if paths else None)
        if paths:
            plain.unload_adapter("x")
        return completion.tokens

    return answered


@pytest.fixture
def running(folder) -> Iterator[Running]:
    with serving(lora_dir=folder, admin_key="boss", name="base") as running:
        yield running


def load(running: Running, name: str, path: str, **more) -> tuple[int, object]:
    return running.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more}, **ADMIN)


def unload(running: Running, name: str) -> tuple[int, object]:
    return running.post("/v1/unload_lora_adapter", {"lora_name": name}, **ADMIN)


def tokens(running: Running, **more) -> list[int]:
    status, said = running.post("/v1/completions", {**BODY, **more})
    assert status == 200, said
    return said["choices"][0]["token_ids"]


def names(running: Running) -> list[str]:
    return [one["id"] for one in running.get("/v1/models")[1]["data"]]


# ---- vLLM's


def test_an_adapter_is_loaded_replaced_and_unloaded(running, expected):
    assert load(running, "x", "a") == (200, "Success: LoRA adapter 'x' added successfully.")
    assert names(running) == ["base", "x"]
    assert tokens(running, model="x") == expected("a")
    status, refused = load(running, "x", "b")
    assert (status, refused["error"]["type"]) == (400, "InvalidUserInput")
    assert refused["error"]["message"] == (
        "The lora adapter 'x' has already been loaded. If you want to load the adapter in place, set 'load_inplace' "
        "to True."
    )
    assert load(running, "x", "b", load_inplace=True)[0] == 200
    assert tokens(running, model="x") == expected("b")
    assert unload(running, "x") == (200, "Success: LoRA adapter 'x' removed successfully.")
    assert names(running) == ["base"]
    status, refused = unload(running, "x")
    assert (status, refused["error"]["type"]) == (404, "NotFoundError")
    assert refused["error"]["message"] == "The lora adapter 'x' cannot be found."
    assert tokens(running, model="x") == expected()


def test_an_adapter_may_be_named_by_its_whole_path(running, folder, expected):
    assert load(running, "x", str(folder / "a"))[0] == 200
    assert tokens(running, model="x") == expected("a")


WRONG = [
    ("../outside", 400, "'../outside' leads out of the folder of adapters"),
    ("/etc", 400, "'/etc' leads out of the folder of adapters"),
    ("link", 400, "'link' leads out of the folder of adapters"),
    ("linked weights", 400, "'linked weights' leads out of the folder of adapters"),
    (".", 400, "'.' leads out of the folder of adapters"),
    ("a\0", 400, "embedded null byte"),
    ("missing", 404, "no adapter 'missing' is in the folder of adapters; there are: a, b, wrong"),
    ("notes.txt", 404, "no adapter 'notes.txt'"),
    ("wrong", 400, "is for a matrix of [128, 128], but the base model's has [64, 64]"),
]


@pytest.mark.parametrize(("path", "status", "message"), WRONG)
def test_what_is_not_in_the_folder_or_does_not_fit_is_refused_in_a_line(running, path, status, message):
    found, refused = load(running, "x", path)
    assert (found, message in refused["error"]["message"]) == (status, True), refused
    assert "\n" not in refused["error"]["message"]
    assert names(running) == ["base"]


def test_no_adapter_takes_the_model_s_name(running):
    status, refused = load(running, "base", "a")
    assert (status, refused["error"]["param"]) == (400, "lora_name")


CHANGES = [
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a"}),
    ("/v1/unload_lora_adapter", {"lora_name": "x"}),
    ("/lora-adapters", []),
    ("/v1/internal/lora/load", {"lora_names": ["a"]}),
    ("/v1/internal/lora/unload", {}),
]


@pytest.mark.parametrize(("path", "body"), CHANGES)
def test_changes_take_the_admin_key(running, path, body):
    for headers in ({}, {"authorization": "Bearer other"}):
        status, refused = running.post(path, body, **headers)
        assert (status, refused["error"]["code"]) == (403, "admin_key_needed")
        assert "this takes the admin key" in refused["error"]["message"]
    assert names(running) == ["base"]


def test_without_an_admin_key_or_a_folder_nobody_changes_anything(folder):
    with serving(lora_dir=folder) as running:
        for path, body in CHANGES:
            status, refused = running.post(path, body, **ADMIN)
            assert (status, refused["error"]["code"]) == (403, "admin_off")
            assert "--admin-key KEY (or LLAMA_ADMIN_KEY)" in refused["error"]["message"]
    with serving(admin_key="boss") as running:
        status, refused = load(running, "x", "a")
        assert (status, "start the server with --lora-dir DIR" in refused["error"]["message"]) == (403, True)
        assert running.get("/v1/internal/lora/list") == (200, {"lora_names": []})


def test_the_admin_key_opens_what_other_keys_open_and_they_change_nothing(folder):
    with serving(lora_dir=folder, admin_key="boss", api_key=["guest"]) as running:
        guest = {"authorization": "Bearer guest"}
        assert running.get("/v1/models", **ADMIN)[0] == running.get("/v1/models", **guest)[0] == 200
        assert running.post("/v1/internal/lora/load", {"lora_names": ["a"]}, **guest)[0] == 403
        assert running.post("//v1/internal//lora/load", {"lora_names": ["a"]}, **guest)[0] == 403
        assert running.post("/v1/internal/lora/load", {"lora_names": ["a"]})[0] == 401


# ---- llama.cpp's


def test_a_request_chooses_adapters_by_number_and_strength(running, expected):
    load(running, "x", "a")
    load(running, "y", "b")
    assert running.get("/lora-adapters")[1] == [
        {"id": 0, "path": "a", "scale": 0.0},
        {"id": 1, "path": "b", "scale": 0.0},
    ]
    for lora, paths in (
        ([], []),
        ([{"id": 0, "scale": 0}], []),
        ([{"id": 0, "scale": 1}], ["a"]),
        ([{"id": 1, "scale": 0.5}], ["b=0.5"]),
        ([{"id": 0, "scale": 0.5}, {"id": 1, "scale": -0.7}], ["a=0.5", "b=-0.7"]),
        ([{"id": 1, "scale": 0.5}], ["b=0.5"]),
    ):
        assert tokens(running, lora=lora) == expected(*paths), lora
    assert names(running) == ["base", "x", "y"]
    status, refused = running.post("/v1/completions", {**BODY, "lora": [{"id": 7, "scale": 1}]})
    assert (status, refused["error"]["param"]) == (400, "lora")
    assert refused["error"]["message"] == "lora holds the id 7: there are 0 (x), 1 (y)"


def test_what_all_get_is_set_by_number(running, expected):
    load(running, "x", "a")
    load(running, "y", "b")
    scales = [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.25}]
    assert running.post("/lora-adapters", scales, **ADMIN) == (200, {"success": True})
    assert [one["scale"] for one in running.get("/lora-adapters")[1]] == [0.5, 0.25]
    assert tokens(running) == expected("a=0.5", "b=0.25")
    assert tokens(running, model="y") == expected("b")
    assert tokens(running, lora=[]) == expected()
    unload(running, "y")
    assert tokens(running) == expected("a=0.5")
    assert running.post("/lora-adapters", [], **ADMIN)[0] == 200
    assert tokens(running) == expected()


def test_mixes_are_few_and_go_with_their_adapters(running, monkeypatch):
    monkeypatch.setattr(llama.server.adapters, "MOST_MIXES", 2)
    load(running, "x", "a")
    for scale in (0.5, 0.6, 0.7, 0.6):
        tokens(running, lora=[{"id": 0, "scale": scale}])
    assert running.server.llm.adapters == ["x", "0.6 * x", "0.7 * x"]
    load(running, "x", "b", load_inplace=True)
    assert running.server.llm.adapters == ["x"]


def test_an_adapter_in_place_of_another_keeps_its_number_and_strength(running, expected):
    load(running, "x", "a")
    running.post("/lora-adapters", [{"id": 0, "scale": 0.5}], **ADMIN)
    load(running, "x", "b", load_inplace=True)
    assert running.get("/lora-adapters")[1] == [{"id": 0, "path": "b", "scale": 0.5}]
    assert tokens(running) == expected("b=0.5")


# ---- text-generation-webui's


def test_adapters_of_the_folder_are_put_on_for_all(running, expected):
    assert running.get("/v1/internal/lora/list") == (200, {"lora_names": ["a", "b", "wrong"]})
    assert running.post("/v1/internal/lora/load", {"lora_names": ["a"]}, **ADMIN) == (200, "OK")
    assert tokens(running) == expected("a")
    assert running.post("/v1/internal/lora/load", {"lora_names": ["b", "a"]}, **ADMIN) == (200, "OK")
    assert tokens(running) == expected("a", "b")
    assert running.post("/v1/internal/lora/load", {"lora_names": ["b"]}, **ADMIN) == (200, "OK")
    assert running.get("/v1/internal/model/info")[1]["lora_names"] == ["b"]
    assert (tokens(running), tokens(running, model="a")) == (expected("b"), expected("a"))
    assert running.post("/v1/internal/lora/unload", {}, **ADMIN) == (200, "OK")
    assert tokens(running) == expected()
    assert names(running) == ["base"]
    status, refused = running.post("/v1/internal/lora/load", {"lora_names": ["c"]}, **ADMIN)
    assert (status, "no adapter 'c'" in refused["error"]["message"]) == (404, True)


# ---- while requests are at work


def frames(stream: HTTPResponse) -> list[dict]:
    lines = [line.removeprefix(b"data: ") for line in stream.read().split(b"\n\n")]
    return [json.loads(line) for line in lines if line.startswith(b"{")]


def test_streams_end_on_the_weights_of_an_adapter_that_is_gone_and_its_blocks_are_not_used_again(folder, expected):
    llm = tiny_llm()
    steps = Stepwise(llm)
    with serving(lambda: llm, lora_dir=folder, admin_key="boss", name="base") as running:
        load(running, "x", "a")
        steps.allow(3)
        streams = [running.open("POST", "/v1/completions", {**BODY, "model": "x", "stream": True}) for _ in range(2)]
        assert b'"token_ids":' in streams[0].readline()
        assert unload(running, "x")[0] == 200
        assert load(running, "x", "b")[0] == 200
        steps.allow()
        assert tokens(running, model="x") == expected("b")
        again = running.post("/v1/completions", {**BODY, "model": "x"})[1]
        assert again["choices"][0]["token_ids"] == expected("b")
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
        found = [token for frame in frames(streams[1]) for token in frame["choices"][0]["token_ids"]]
        assert found == expected("a")
        assert frames(streams[0])[-1]["choices"][0]["finish_reason"] == "length"
        running.wait_until_idle()
        assert llm.model.layers[0].attention.out.added.changes.keys() == {2}, "the old adapter is still there"


def test_streams_go_on_while_an_adapter_is_read(running, monkeypatch, expected):
    is_reading, may_go_on = threading.Event(), threading.Event()
    read = llama.server.adapters.read_adapters

    def reading(*args):
        is_reading.set()
        assert may_go_on.wait(60)
        return read(*args)

    monkeypatch.setattr(llama.server.adapters, "read_adapters", reading)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, running, "x", "a")
        assert is_reading.wait(60)
        assert tokens(running) == expected()
        assert names(running) == ["base"]
        may_go_on.set()
        assert loading.result()[0] == 200
    assert tokens(running, model="x") == expected("a")


CHAT = {"model": "x", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
WIRES = [("/v1/completions", BODY | {"model": "x"}), ("/v1/chat/completions", CHAT), ("/v1/messages", CHAT)]
MOMENTS = [
    ("its adapter was looked up", lambda server: (server.model.adapters, "choose")),
    ("its queries were checked", lambda server: (server.llm, "validate")),
    ("it went to the engine", lambda server: (server.engine, "open")),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), WIRES, ids=[path for path, _ in WIRES])
@pytest.mark.parametrize("moment", [find for _, find in MOMENTS], ids=[name for name, _ in MOMENTS])
def test_a_request_whose_adapter_is_unloaded_just_before_something_is_not_found(
    running, monkeypatch, moment, path, body, is_streamed
):
    load(running, "x", "a")
    owner, method = moment(running.server)
    then, thread = getattr(owner, method), running.server.engine

    def unload_first(*args):
        thread.ask(lambda: thread.call("unload_adapter", "x"))
        del running.server.model.adapters._by_name["x"]
        if method != "open":  # which the event loop calls
            thread.ask(lambda: None).result()
        return then(*args)

    monkeypatch.setattr(owner, method, unload_first)
    status, refused = running.post(path, body | {"stream": is_streamed})
    assert status == 404
    assert refused["error"]["message"] == "no adapter 'x' is loaded; there are: none"
    assert refused["error"]["type"] == ("not_found_error" if path == "/v1/messages" else "invalid_request_error")
    monkeypatch.undo()
    assert tokens(running, model="base")
    running.wait_until_idle()
