"""Keys, hosts and origins on a server's own routes, from sockets."""

import pytest
from support.loops import run_async
from support.server import Running, serving, tiny_llm
from support.sockets import connect, error, exchange, request, status

from llama.server.app import make_app
from llama.server.page_files import page_files
from llama.server.run import PUBLIC
from llama.server.server import Server
from llama.server.settings import ServerSettings

MODEL = "GET /v1/models HTTP/1.1"


@pytest.fixture(scope="module")
def closed() -> Running:
    with serving(api_key=["secret"], ollama=True) as running:
        yield running


def routes() -> list[tuple[str, str]]:
    """Every method and path that the application answers."""

    async def found() -> list[tuple[str, str]]:
        app = make_app(Server(tiny_llm, ServerSettings(ollama=True)))
        return [(method, route.path) for route in app.routes for method in sorted(route.methods)]

    return run_async(found())


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_asks_for_a_key_but_those_that_are_public(closed, method, path):
    path = path.replace("{name:path}", "tiny")
    for key, right in (("", False), ("wrong", False), ("secret", True)):
        headers = ["Host: localhost", *([f"Authorization: Bearer {key}"] if key else [])]
        answer = exchange(closed, request(f"{method} {path} HTTP/1.1", headers))
        assert (status(answer) == 401) is not (right or path in {*PUBLIC, *page_files()})
        assert b"\r\nx-request-id: " in answer


def test_the_public_paths_are_these():
    assert PUBLIC == ("/health",)
    assert {"/health", "/metrics", "/v1/chat/completions", "/openapi.json"} <= {path for _, path in routes()}
    assert not {"/docs", "/redoc"} & {path for _, path in routes()}  # their scripts would come from another host


@pytest.mark.parametrize(
    "host",
    [
        "localhost/health?",
        "localhost/health#",
        "/health",
        "localhost:8000/health",
        "a@localhost",
        "localhost\\health",
        "evil.example",
        "localhost, localhost",
        "localhost health",
        "[::1",
        "localhost:",
        "localhost:99999999",
        "\xff",
    ],
)
def test_no_host_header_opens_a_path(closed, host):
    assert status(exchange(closed, request(MODEL, [f"Host: {host}"]))) in (400, 401, 403)
    with_key = exchange(closed, request(MODEL, [f"Host: {host}", "X-Api-Key: secret"]))
    assert status(with_key) in (400, 403)


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/%761/models",
        "/v1/models/",
        "/V1/models",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health?/v1/models",
        "http://localhost/v1/models",
        "http://localhost/health/v1/models",
        "/v1/models?/health",
        "/v1/models#/health",
        "/;/health",
        "*",
        "health",
    ],
)
def test_no_spelling_of_a_path_goes_around_the_key(closed, target):
    answer = exchange(closed, request(f"GET {target} HTTP/1.1"))
    assert status(answer) in (400, 401) or target.startswith("/health?")
    assert b"owned_by" not in answer


def test_a_spelling_that_means_the_route_answers_with_a_key(closed):
    for target in ("//v1/models", "/%761/models", "http://localhost/v1/models"):
        answer = exchange(closed, request(f"GET {target} HTTP/1.1", ["Host: localhost", "X-Api-Key: secret"]))
        assert (target, status(answer), b"owned_by" in answer) == (target, 200, True)


def test_an_upgrade_to_a_websocket_asks_for_a_key_as_all_do(closed):
    upgrade = ["Host: localhost", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    with connect(closed) as client:
        client.sendall(request("GET /v1/models HTTP/1.1", [*upgrade, "Sec-WebSocket-Key: AAAA"], close=False))
        assert status(client.recv(65536)) == 401


def test_a_refusal_has_the_form_of_its_wire(closed):
    found = error(exchange(closed, request(MODEL)))
    assert sorted(found) == ["code", "message", "param", "type"]
    assert found["code"] == "invalid_api_key"


def test_what_one_key_s_prompts_left_in_the_cache_is_not_found_by_another():
    prompt = {"model": "m", "prompt": [1] * 40, "max_tokens": 1}

    def num_cached(running: Running, key: str) -> int:
        _, answer = running.post("/v1/completions", prompt, **{"x-api-key": key})
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    with serving(api_key=["one,two"], quiet=True) as running:
        assert [num_cached(running, key) for key in ("one", "two", "one", "two")] == [0, 0, 32, 32]


def test_pages_of_other_sites_are_refused_unless_they_are_listed():
    headers = ["Host: localhost", "Origin: https://page.example", "Content-Type: application/json", "Content-Length: 2"]
    for origins, expected in ((None, 403), (["https://page.example"], 400)):
        with serving(allowed_origins=origins, quiet=True) as running:
            answer = exchange(running, request("POST /v1/completions HTTP/1.1", headers, b"{}"))
            assert status(answer) == expected
            assert (b"access-control-allow-origin: https://page.example" in answer) is (expected == 400)
