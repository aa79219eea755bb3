"""What no honest client sends: each is refused or harmless, and the next request is answered."""

import json
import socket

import pytest
from support.server import Running, serving
from support.sockets import connect, error, exchange, post, read_all, request, status

from llama.server import connection, run

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def running() -> Running:
    """A server whose side of a connection keeps little of what is not read."""

    def bound(settings):
        listening = run.bound(settings)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listening

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("support.server.bound", bound)
        with serving(quiet=True, max_body=100_000, body_timeout=0.2, send_timeout=0.2) as running:
            yield running


@pytest.fixture(autouse=True)
def _is_answered_afterwards(running):
    yield
    assert running.post(TEXT, {"model": "m", "prompt": [1, 2], "max_tokens": 2})[0] == 200
    running.wait_until_idle()


# ---- bodies


def test_a_body_that_is_too_large_is_refused_by_its_length_and_by_its_bytes(running):
    large = b'"' + b"x" * 200_000 + b'"'
    assert error(exchange(running, post(TEXT, large)))["code"] == "request_too_large"
    headers = ["Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked"]
    chunks = [b"%x\r\n%s\r\n" % (5000, b"x" * 5000)] * 40
    answer = exchange(running, request(f"POST {TEXT} HTTP/1.1", headers), *chunks, b"0\r\n\r\n")
    assert (status(answer), error(answer)["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b"{} {}",
        b'{"model": "m", "prompt": "x",}',
        b"{'model': 'm'}",
        b"\xff\xfe{\x00}\x00",
        b'\xef\xbb\xbf{"model": "m"}',
        b'{"model": "m", "prompt": "\xff"}',
        b'{"model": "m", "prompt": "\x00"}',
        b'{"model": "m", "prompt": NaN}',
        b'{"model": "m", "prompt": "x", "temperature": NaN}',
        b'{"model": "m", "prompt": "x", "temperature": Infinity}',
        b'{"model": "m", "prompt": "x", "temperature": 1e400}',
        b'{"model": "m", "prompt": "x", "max_tokens": 1e400}',
        b'{"model": "m", "prompt": "x", "max_tokens": -2}',
        b'{"model": "m", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 30 + b"}",
        b'{"model": "m", "prompt": "x", "n": true}',
        b'{"model": "m", "prompt": [1, ' + b"9" * 30 + b"]}",
        b'{"model": "m", "prompt": [[[1]]]}',
        b"[" * 50_000,
        b'{"a":' * 20_000,
        b'{"model": "m", "prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_malformed_body_is_refused_in_words(running, body):
    answer = exchange(running, post(TEXT, body))
    assert status(answer) == 400
    assert sorted(error(answer)) == ["code", "message", "param", "type"]
    assert "Traceback" not in answer.decode("latin-1")


LONE = "\ud800"
CONTROLS = "<s></s>[INST] [/INST]<<SYS>>\n<|eot_id|>\x00\x1b[2J\u202e\uffff"


@pytest.mark.parametrize("text", [LONE, "a\udfff", "\udfff\ud800", CONTROLS], ids=ascii)
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "TEXT"},
        {"prompt": ["TEXT", "b"]},
        {"prompt": "x", "stop": "TEXT"},
        {"prompt": "x", "stop": ["TEXT"]},
        {"prompt": "x", "user": "TEXT"},
        {"prompt": "x", "model": "TEXT"},
        {"prompt": "x", "TEXT": 1},
        {"prompt": "x", "logit_bias": {"TEXT": 1}},
        {"messages": [{"role": "user", "content": "TEXT"}]},
        {"messages": [{"role": "TEXT", "content": "x"}]},
        {"messages": [{"role": "system", "content": "TEXT"}, {"role": "user", "content": "TEXT"}]},
        {"messages": [{"role": "user", "content": "x", "name": "TEXT"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "TEXT"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "TEXT", "text": "x"}]}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_lone_surrogates_and_control_tokens_in_any_field_are_refused_or_harmless(running, body, text, stream):
    written = json.dumps({"model": "m", "max_tokens": 2, "stream": stream, **body}).replace('"TEXT"', json.dumps(text))
    answer = exchange(running, post(TEXT if "prompt" in body else CHAT, written.encode()))
    assert status(answer) in (200, 400, 404), answer
    answer.decode("utf-8")


@pytest.mark.parametrize("path", ["/%ff", "/%00", "/v1/models/%ed%a0%80", "/" + "x" * 9000, "/%", "/\xff", "/a b"])
def test_a_path_may_be_anything(running, path):
    answer = exchange(running, request(f"GET {path} HTTP/1.1"))
    assert status(answer) in (400, 404)


# ---- time


def test_a_body_that_drips_is_cut_off(running):
    head = post(TEXT, b"x" * 1000)[:-999]
    assert error(exchange(running, head))["code"] == "request_timeout"


def test_a_body_with_a_length_that_is_a_lie_is_cut_off(running):
    answer = exchange(running, post(TEXT, {"model": "m", "prompt": [1], "max_tokens": 1}, "Content-Length: 9999"))
    assert status(answer) in (400, 408)


def test_a_head_that_drips_is_cut_off(running, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.05)
    assert exchange(running, b"GET / HTTP/1.1\r\nHost: local") == b""
    assert exchange(running) == b""


def test_a_head_without_an_end_is_cut_off(running):
    assert exchange(running, b"GET / HTTP/1.1\r\n", b"x-long: " + b"x" * 300_000, b"x" * 300_000) == b""


def test_a_client_that_does_not_read_is_left_and_holds_nothing(running):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "n": 4,
        "max_tokens": 100,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    with connect(running, SO_RCVBUF=4096) as client:
        client.sendall(post(CHAT, body))
        assert client.recv(1) == b"H"
        assert running.post(TEXT, {"model": "m", "prompt": [1], "max_tokens": 2})[0] == 200  # nobody else waits
        running.wait_until(lambda: not running.server.engine.streams)
        assert b"[DONE]" not in read_all(client)[-20:]


# ---- framing


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 2", "Transfer-Encoding: chunked"],
        ["Content-Length: 2", "Content-Length: 3"],
        ["Content-Length: +2"],
        ["Content-Length: 0x2"],
        ["Content-Length : 2"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["X: a\0b"],
        [" folded: x"],
    ],
    ids=str,
)
def test_a_request_with_two_ends_is_refused(running, headers):
    own = ["Host: localhost", "Content-Type: application/json"]
    smuggled = request("GET /v1/models HTTP/1.1")
    answer = exchange(running, request(f"POST {TEXT} HTTP/1.1", own + headers, b"{}" + smuggled))
    assert status(answer) in (400, 408, 415, 501)
    assert b"owned_by" not in answer


@pytest.mark.parametrize(
    "data", [b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n"]
)
def test_what_is_no_request_ends_the_connection(running, monkeypatch, data):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.05)
    assert status(exchange(running, data)) in (400, None)


def test_requests_in_one_packet_are_answered_in_order(running):
    first = request("GET /version HTTP/1.1", close=False)
    second = request("GET /v1/models HTTP/1.1")
    answer = exchange(running, first + second)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.index(b'"version"') < answer.index(b'"owned_by"')


def test_http_1_0_is_answered(running):
    assert status(exchange(running, b"GET /health HTTP/1.0\r\n\r\n")) == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "HEAD"])
def test_another_method_is_refused_in_words(running, method):
    answer = exchange(running, request(f"{method} /v1/models HTTP/1.1"))
    assert status(answer) == 405


# ---- clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_at_once_holds_nothing(running, stream):
    body = {"model": "m", "prompt": [[1, 2], [3]], "n": 3, "ignore_eos": True, "stream": stream}
    for _ in range(8):
        with connect(running) as client:
            client.sendall(post(TEXT, body))
    running.wait_until_idle()
