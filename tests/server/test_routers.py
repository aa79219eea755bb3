"""Servers behind a router: nginx as docs/serving.md configures it, and what other routers ask of a server."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import free_port
from support.server import Running, Stepwise, serving, tiny_llm

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/bin")
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
LONG = {"model": "m", "prompt": [1, 2, 3], "stream": True, "ignore_eos": True, "max_tokens": 40}
SHORT = {"model": "m", "prompt": [1, 2, 3], "ignore_eos": True, "max_tokens": 2, "cache_salt": "mine"}


class Server:
    """A server whose steps a test allows."""

    def __init__(self, stack: ExitStack, **settings):
        self.running: Running = stack.enter_context(serving(self.build, **settings))

    def build(self):
        llm = tiny_llm()
        self.steps = Stepwise(llm)
        return llm

    @property
    def num_open(self) -> int:
        return self.running.call(lambda: len(self.running.server.engine.streams))

    @property
    def statuses(self) -> dict[int, int]:
        return self.running.call(lambda: dict(self.running.server.metrics.statuses))


@contextmanager
def nginx(folder: Path, *servers: Server, buffering: str) -> Iterator[int]:
    """The port of nginx, as the documentation configures it, in front of two servers."""
    [block] = re.findall(r"^```nginx\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert "proxy_buffering off;" in block
    block = block.replace("proxy_buffering off;", f"proxy_buffering {buffering};")
    port = free_port()
    for number, own in ((8000, port), *((8001 + i, server.running.port) for i, server in enumerate(servers))):
        assert f"{number}" in block
        block = re.sub(rf"\b{number}\b", str(own), block)
    block = block.replace(f"listen {port}", f"listen 127.0.0.1:{port}")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;\n"
        f"events {{}}\nhttp {{ access_log {folder}/requests; {paths}\n{block}}}\n"
    )
    process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "errors"])
    try:
        while True:
            try:
                assert process.poll() is None, (folder / "errors").read_text()
                replace(servers[0].running, port=port).get("/health")
                break
            except ConnectionRefusedError:
                continue
        yield port
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def buffering() -> str:
    return "off"


@pytest.fixture
def behind(tmp_path, buffering) -> Iterator[tuple[Running, Server, Server]]:
    """nginx as a server is reached, and the two behind it."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    with ExitStack() as stack:
        first, second = Server(stack), Server(stack)
        port = stack.enter_context(nginx(tmp_path, first, second, buffering=buffering))
        yield replace(first.running, port=port), first, second
        for server in (first, second):
            server.steps.allow()


def frames(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_nginx_passes_each_piece_of_a_stream_on_as_it_comes(behind):
    proxy, *servers = behind
    for server in servers:
        server.steps.allow(2)
    stream = proxy.open("POST", "/v1/completions", LONG)
    first = stream.readline()  # the model is not allowed to go on before it is here
    assert json.loads(first.removeprefix(b"data: "))["choices"]
    for server in servers:
        server.steps.allow()
    assert frames(stream.read().decode())[-1] == "[DONE]"


def test_a_request_keeps_its_id_through_nginx(behind):
    proxy, *servers = behind
    for server in servers:
        server.steps.allow()
    given = proxy.open("POST", "/v1/completions", SHORT, {"x-request-id": "mine-7"})
    assert (given.status, given.headers["x-request-id"]) == (200, "mine-7")
    made = proxy.open("POST", "/v1/completions", SHORT)
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    assert proxy.get("/v1/models")[1]["data"][0]["object"] == "model"
    assert "vllm:num_requests_waiting" in proxy.get("/metrics")[1]


def test_a_server_that_drains_behind_nginx_gets_nothing_new_and_nobody_notices(behind):
    proxy, first, second = behind
    for server in (first, second):
        server.steps.allow(2)
    streams = [proxy.open("POST", "/v1/completions", LONG) for _ in range(2)]
    begun = [stream.read(1) for stream in streams]
    assert (first.num_open, second.num_open) == (1, 1)
    first.running.call(first.running.stop)
    assert first.running.get("/health")[0] == 503
    answered = first.statuses.get(200, 0)
    second.steps.allow()
    for _ in range(6):
        status, answer = proxy.post("/v1/completions", SHORT)
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")
    assert first.statuses.get(200, 0) == answered
    first.steps.allow()
    for start, stream in zip(begun, streams, strict=True):
        found = frames((start + stream.read()).decode())
        assert found[-1] == "[DONE]"
        assert json.loads(found[-2])["choices"][0]["finish_reason"] == "length"


# ---- what SGLang's gateway asks


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(tiny_llm, admin_key="boss", name="tiny") as server:
        yield server


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
def test_a_gateway_learns_what_the_model_is(running, path):
    status, info = running.get(path)
    assert status == 200
    assert (info["model_path"], info["served_model_name"], info["is_generation"]) == ("tiny", "tiny", True)


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info"])
def test_a_gateway_learns_what_the_server_has_room_for(running, path):
    status, info = running.get(path)
    stats = running.server.llm.engine.stats()
    assert status == 200
    assert [info[name] for name in ("tp_size", "pp_size", "dp_size")] == [1, 1, 1]
    assert info["max_total_num_tokens"] == info["page_size"] * stats.num_blocks
    assert info["context_length"] == running.server.llm.max_seq_len


def test_a_gateway_sees_the_load_and_that_the_engine_is_well(running):
    assert running.get("/get_load") == (
        200,
        [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}],
    )
    assert running.get("/health_generate") == (200, {"status": "ok"})


def test_what_is_cached_is_forgotten_with_the_admin_key(running):
    body = {"model": "tiny", "prompt": [*range(1, 60)], "max_tokens": 1}

    def num_cached() -> int:
        return running.post("/v1/completions", body)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [num_cached(), num_cached()] == [0, 48]
    assert running.post("/flush_cache", None)[0] == 403
    assert running.post("/flush_cache", None, **{"x-api-key": "boss"}) == (200, "Cache flushed.\n")
    assert num_cached() == 0


def test_while_it_stops_a_server_tells_a_gateway_so():
    with serving() as stopping:
        stream = stopping.open("POST", "/v1/completions", LONG | {"max_tokens": 200})
        stream.read(1)
        stopping.call(stopping.stop)
        for path in ("/get_model_info", "/get_server_info", "/get_load", "/health_generate"):
            assert stopping.get(path)[0] == 503
        stream.read()
