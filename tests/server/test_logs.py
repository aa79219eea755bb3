import asyncio
import json

import pytest
from support.asgi import ask, echo, scope

from llama.server.logs import RequestLog


class Logged:
    """An app with its log."""

    def __init__(self, app=echo):
        self.lines: list[str] = []
        self.failures: list[str] = []
        self.statuses: list[int] = []
        self.app = RequestLog(
            app, write=self.lines.append, tell_failure=self.failures.append, count=self.statuses.append
        )

    def ask(self, *args, **more):
        return ask(self.app, *args, **more)

    @property
    def entry(self):
        return json.loads(self.lines[-1])


def test_a_request_is_one_line_of_json_without_what_was_asked():
    logged = Logged()
    logged.ask(scope("POST", "/v1/completions", {"authorization": "Bearer secret"}, query_string=b"q=1"), [b"a prompt"])
    entry = logged.entry
    assert entry.pop("time").endswith("+00:00")
    assert entry.pop("ms") >= entry.pop("first_byte_ms") >= 0
    assert len(entry.pop("request_id")) == 32
    assert entry.pop("bytes_sent") > 0
    assert entry == {
        "client": "127.0.0.1:4000",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "complete": True,
        "bytes_received": 8,
    }
    assert not any(word in logged.lines[0] for word in ("prompt", "secret", "q=1"))


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64])
def test_a_request_keeps_the_id_that_it_brings(given):
    logged = Logged()
    answer = logged.ask(scope(headers={"x-request-id": given}))
    assert answer.headers["x-request-id"] == logged.entry["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\nb", "\x1b[31m", "ä", "٣", '"'])
def test_an_id_that_could_forge_a_line_is_replaced(given):
    logged = Logged()
    answer = logged.ask(scope(headers={"x-request-id": given} if given.isascii() else {"x-request-id": "\xe4"}))
    assert answer.headers["x-request-id"] == logged.entry["request_id"] != given


def test_the_app_knows_its_request_s_id():
    assert json.loads(Logged().ask(scope()).body)["state"] == ["request_id"]


def test_control_characters_are_escaped():
    logged = Logged()
    logged.ask(scope(path="/\x1b[2J\r\n{}\x7f\x85\u2028\x9b31m" + "x" * 999))
    assert logged.lines[0].isascii()
    assert logged.lines[0].isprintable()
    assert len(logged.entry["path"]) == 200


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_are_told_only_where_they_fail(path):
    logged = Logged()
    logged.ask(scope(path=path))
    assert logged.lines == []

    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": []})

    logged = Logged(failing)
    logged.ask(scope(path=path))
    assert logged.entry["status"] == 503


def test_a_failure_is_told_and_answered_without_its_text():
    async def failing(scope, receive, send):
        raise KeyError("/home/somebody/secret")

    logged = Logged(failing)
    answer = logged.ask(scope())
    assert (answer.status, answer.error["type"], answer.error["code"]) == (500, "server_error", "internal_error")
    assert b"secret" not in answer.body
    assert answer.headers["x-request-id"] in answer.error["message"]
    assert "KeyError: '/home/somebody/secret'" in logged.failures[0]
    assert answer.headers["x-request-id"] in logged.failures[0]
    assert logged.entry["status"] == 500


def test_half_an_answer_is_left_for_the_server_to_cut_off():
    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    logged = Logged(failing)
    assert len(logged.ask(scope()).messages) == 1
    assert (logged.entry["status"], logged.entry["complete"]) == (200, False)


def test_a_client_that_left_early_is_told_too():
    async def leaving(scope, receive, send):
        await receive()
        raise asyncio.CancelledError

    logged = Logged(leaving)
    with pytest.raises(asyncio.CancelledError):
        logged.ask(scope())
    assert (logged.entry["status"], logged.entry["complete"], logged.failures) == (None, False, [])


def test_a_client_that_does_not_read_is_no_failure():
    async def cut_off(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ConnectionAbortedError("the client does not read")

    logged = Logged(cut_off)
    logged.ask(scope())
    assert (logged.entry["status"], logged.entry["complete"], logged.failures) == (200, False, [])


def test_every_answer_is_counted_by_its_status():
    logged = Logged()
    for path in ("/", "/health"):
        logged.ask(scope(path=path))
    assert logged.statuses == [200, 200]
