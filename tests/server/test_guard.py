import json
from hashlib import sha256

import pytest
from support.asgi import ask, echo, scope
from support.loops import run_async

from llama.server.guard import AllowedHosts, Guard

LOCAL = AllowedHosts.of("127.0.0.1")
OPEN = Guard(echo, hosts=LOCAL)
CLOSED = Guard(echo, hosts=LOCAL, keys=["one", "two"], public=["/health", "/"])
SHARED = Guard(echo, hosts=LOCAL, keys=["one"], origins=["https://page.example"])
SITE = {"origin": "https://page.example"}


# ---- keys


@pytest.mark.parametrize(
    "given",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer   two"},
        {"x-api-key": "two"},
        {"authorization": "Bearer wrong", "x-api-key": "one"},
    ],
)
def test_whoever_has_a_key_is_let_through(given):
    assert ask(CLOSED, scope(path="/v1/models", headers=given)).status == 200


@pytest.mark.parametrize(
    "given",
    [
        {"authorization": "Bearer three"},
        {"authorization": "Bearer "},
        {"authorization": "one"},
        {"authorization": "Basic one"},
        {"x-api-key": "onetwo"},
        {"x-api-key": "ключ".encode().decode("latin-1")},
        {"x-api-key": "\xff"},
        {"cookie": "one"},
        {},
    ],
)
def test_a_wrong_key_or_none_is_told_how_to_send_one(given):
    answer = ask(CLOSED, scope(path="/v1/models", headers=given))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.error["type"] == "authentication_error"
    assert answer.error["code"] == "invalid_api_key"
    assert "Authorization: Bearer KEY" in answer.error["message"]


@pytest.mark.parametrize("path", ["/", "/health"])
def test_public_paths_need_no_key(path):
    assert ask(CLOSED, scope(path=path)).status == 200


@pytest.mark.parametrize(
    "path", ["//health", "/health/", "/HEALTH", "/health/../v1/models", "/health;x", "//", "", "/health%00", "/nothing"]
)
def test_whatever_is_not_public_to_the_letter_needs_one(path):
    assert ask(CLOSED, scope(path=path)).status == 401


@pytest.mark.parametrize(
    "host", ["localhost/health?", "localhost#/health", "health", "localhost:80/", "localhost@x", ""]
)
def test_a_host_header_opens_nothing(host):
    assert ask(CLOSED, scope(path="/v1/models", headers={"host": host})).status in (400, 403)


def test_doubled_slashes_are_made_one_behind_the_check():
    answer = ask(CLOSED, scope(path="//v1///models", headers={"x-api-key": "one"}))
    assert json.loads(answer.body)["path"] == "/v1/models"


def test_the_app_learns_which_key_was_given_as_its_digest():
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope["state"])

    ask(Guard(app, hosts=LOCAL, keys=["one", "two"]), scope(headers={"x-api-key": "two"}, state={"mine": 1}))
    assert seen == {"mine": 1, "key": sha256(b"two").digest(), "is_admin": False}


@pytest.mark.parametrize("keys", [[], ["one"]])
def test_the_app_learns_whether_the_admin_asks(keys):
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope["state"])

    guard = Guard(app, hosts=LOCAL, keys=keys, admin_key="boss")
    for given, is_admin in (("boss", True), ("one", False)):
        ask(guard, scope(headers={"x-api-key": given}))
        assert seen["is_admin"] is is_admin
    assert (
        ask(Guard(app, hosts=LOCAL, keys=["one"], admin_key="boss"), scope(headers={"x-api-key": "two"})).status == 401
    )


def test_a_key_is_compared_with_each_of_them_in_the_time_of_one(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    for key in ("one", "neither"):
        ask(CLOSED, scope(headers={"x-api-key": key}))
    assert len(compared) == 4
    assert {len(side) for pair in compared for side in pair} == {32}


def test_without_keys_nobody_is_asked_for_one():
    assert ask(OPEN, scope("POST", "/v1/completions")).status == 200


def test_a_websocket_is_closed():
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    run_async(OPEN({**scope(path="/health"), "type": "websocket"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---- hosts


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:8000"])
def test_a_server_of_this_machine_goes_by_its_loopback_names(host):
    assert host in LOCAL


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.5",
        "localhost.evil.example",
        "::1",
        "a/v1?",
        "x#",
        "a b",
        "a@b",
    ],
)
def test_and_by_no_other(host):
    assert host not in LOCAL
    assert ask(OPEN, scope(headers={"host": host})).status in (400, 403)


def test_a_server_that_others_reach_goes_by_any_address_and_by_the_names_it_was_given():
    hosts = AllowedHosts.of("0.0.0.0", ["llm.example"])
    for host in ("10.0.0.7:8000", "[2001:db8::1]:8000", "llm.example", "LLM.example:443", "localhost"):
        assert host in hosts
    assert "evil.example" not in hosts
    assert "box" in AllowedHosts.of("box")


def test_a_star_stands_for_every_name_but_for_nothing_malformed():
    hosts = AllowedHosts.of("127.0.0.1", ["*"])
    assert "whatever.example" in hosts
    assert "a/v1?" not in hosts


def test_a_name_that_is_not_ours_is_refused_with_what_to_do():
    answer = ask(OPEN, scope(headers={"host": "evil.example"}))
    assert answer.status == 403
    assert answer.error["message"] == (
        "this server does not go by the name evil.example: start it with --allowed-hosts to change that"
    )


def test_only_http_1_0_may_leave_the_host_out_and_nobody_sends_two():
    without = {**scope(), "headers": []}
    assert ask(OPEN, without).status == 400
    assert ask(OPEN, {**without, "http_version": "1.0"}).status == 200
    assert ask(OPEN, {**scope(), "headers": [(b"host", b"localhost")] * 2}).status == 400


# ---- pages of other sites


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "http://localhost.evil"])
def test_a_page_of_another_site_may_change_nothing_and_read_nothing(origin):
    assert ask(OPEN, scope("POST", headers={"origin": origin})).status == 403
    answer = ask(OPEN, scope("GET", headers={"origin": origin}))
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers


def test_the_server_s_own_page_may():
    own = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    assert ask(OPEN, scope("POST", headers=own)).status == 200


def test_a_preflight_of_a_site_that_is_not_listed_is_refused():
    question = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for guard in (OPEN, SHARED):
        assert ask(guard, scope("OPTIONS", headers=question)).status == 403


def test_a_listed_site_is_told_what_it_may_send_before_any_key():
    question = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-mine"}
    answer = ask(SHARED, scope("OPTIONS", "/v1/completions", SITE | question))
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert answer.headers["access-control-allow-headers"] == "authorization,x-mine"
    assert "access-control-allow-credentials" not in answer.headers


def test_a_listed_site_reads_answers_and_refusals():
    for headers, status in ((SITE | {"x-api-key": "one"}, 200), (SITE, 401)):
        answer = ask(SHARED, scope("POST", headers=headers))
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert answer.headers["vary"] == "origin"


def test_what_a_preflight_lists_is_not_repeated_where_it_is_no_list_of_names():
    question = {"access-control-request-method": "POST", "access-control-request-headers": 'a"<b>'}
    assert ask(SHARED, scope("OPTIONS", headers=SITE | question)).headers["access-control-allow-headers"] == ""


def test_options_without_a_question_needs_a_key_as_all_do():
    assert ask(SHARED, scope("OPTIONS", headers=SITE)).status == 401
