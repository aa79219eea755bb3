import json

import pytest
from support.asgi import ask, echo, scope
from support.loops import run_async

import llama.server.limits
from llama.server.limits import BodyLimits

LIMITED = BodyLimits(echo, max_bytes=10, timeout=60)
JSON = {"content-type": "application/json"}


def post(app, pieces, headers=JSON, length=None, **more):
    framing = {"transfer-encoding": "chunked"} if length is None else {"content-length": str(length)}
    return ask(app, scope("POST", "/v1/completions", headers=headers | framing), pieces, **more)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_body_is_handed_on_whole(content_type):
    answer = post(LIMITED, [b"01234", b"", b"56789"], {"content-type": content_type})
    assert json.loads(answer.body)["body"] == "0123456789"


def test_behind_the_body_the_app_hears_that_the_client_left():
    heard = []

    async def app(scope, receive, send):
        heard.extend([(await receive())["body"], (await receive())["type"]])

    messages = [{"type": "http.request", "body": b"ab"}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    limited = BodyLimits(app, max_bytes=9, timeout=60)
    run_async(limited(scope("POST", headers=JSON | {"content-length": "2"}), receive, None))
    assert heard == [b"ab", "http.disconnect"]


@pytest.mark.parametrize("length", [None, 5, 10])
def test_bytes_are_counted_whatever_the_length_says(length):
    answer = post(LIMITED, [b"01234", b"56789", b"x"], length=length)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert answer.error["message"] == "the body has more than 10 bytes"
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("length", ["11", "9" * 18, "9" * 5000])
def test_a_length_that_is_too_large_is_refused_before_a_byte_is_read(length):
    assert post(LIMITED, [b"x"], length=length).status == 413


@pytest.mark.parametrize("length", ["-1", "ten", "", "٣", "1.5"])
def test_a_length_that_is_no_number_is_refused(length):
    headers = [(b"content-length", length.encode()), (b"content-type", b"application/json")]
    assert ask(LIMITED, {**scope("POST"), "headers": headers}).status == 400


def test_a_refused_client_may_send_the_rest_and_then_reads_the_whole_answer():
    answer = post(LIMITED, [b"x" * 8] * 20)
    assert answer.unread == []
    assert len(answer.body) == int(answer.headers["content-length"])
    assert answer.messages[-1] == {"type": "http.response.body"}


def test_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(llama.server.limits, "LINGER", 0)
    answer = post(LIMITED, [b"x" * 11, b""], length=None, then="stalls")
    assert answer.messages[-1] == {"type": "http.response.body"}


def test_a_body_that_stays_away_is_refused():
    answer = post(BodyLimits(echo, max_bytes=10, timeout=0), [b"0"], length=2, then="stalls")
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert answer.error["message"] == "the body is not complete after 0 s: send it faster"


def test_each_byte_gives_a_body_more_time(monkeypatch):
    monkeypatch.setattr(llama.server.limits, "LEAST_RATE", 1e-9)
    slow = BodyLimits(echo, max_bytes=10, timeout=0)
    assert post(slow, [b"0", b"1"]).status == 200
    assert post(slow, [b"", b"1"]).status == 408


def test_a_client_that_leaves_gets_nothing():
    assert post(LIMITED, [b"0"], then="leaves").messages == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=application/json"},
        JSON | {"content-encoding": "gzip"},
    ],
)
def test_a_body_that_is_not_plain_json_is_refused_with_the_header_to_send(headers):
    answer = post(LIMITED, [b"{}"], headers, length=2)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert "send" in answer.error["message"]


@pytest.mark.parametrize("headers", [{}, {"content-length": "0"}])
def test_a_request_without_a_body_needs_no_type(headers):
    assert ask(LIMITED, scope("POST", headers=headers)).status == 200
