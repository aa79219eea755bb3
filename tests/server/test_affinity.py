"""Which replica gets a request: requests that begin alike go where their beginning was read, unless that is busy."""

import json

import pytest

from llama.server.affinity import BLOCK, MOST_AHEAD, Affinity, beginnings

SYSTEM = {"role": "system", "content": "You know everything about ships. " * 40}


def chat(*texts: str, **body) -> bytes:
    messages = [SYSTEM, *({"role": "user", "content": text} for text in texts)]
    return json.dumps({"model": "m", "messages": messages, **body}).encode()


def test_a_dialog_begins_as_it_did_one_turn_ago():
    before, after = beginnings(chat("one")), beginnings(chat("one", "two " * 200))
    assert len(before) >= 1300 // BLOCK
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_fields_around_the_prompt_change_no_beginning():
    plain = beginnings(chat("one"))
    assert beginnings(chat("one", temperature=0.5, max_tokens=9)) == plain
    assert beginnings(json.dumps({"seed": 3, **json.loads(chat("one"))}, indent=2).encode()) == plain


@pytest.mark.parametrize("changes", [{"model": "adapter"}, {"cache_salt": "mine"}, {"tools": [{"name": "f"}]}])
def test_what_shares_no_cache_shares_no_beginning(changes):
    assert not {*beginnings(chat("one"))} & {*beginnings(chat("one", **changes))}


def test_requests_under_different_keys_share_no_beginning():
    assert not {*beginnings(chat("one"), b"a")} & {*beginnings(chat("one"), b"b")}


@pytest.mark.parametrize("body", [b"", b"not json", b"[1]", b"[" * 100_000, b'{"prompt": "short"}', b"\xff\xfe"])
def test_what_is_no_body_or_a_short_one_has_no_beginning(body):
    assert beginnings(body) == []


def test_prompts_of_token_ids_have_beginnings_too():
    ids = list(range(400))
    first = beginnings(json.dumps({"prompt": ids}).encode())
    assert first
    assert beginnings(json.dumps({"prompt": [*ids, 7, 8, 9]}).encode())[: len(first) - 1] == first[:-1]


def test_a_known_beginning_goes_where_it_was_read():
    affinity = Affinity()
    affinity.record([b"1", b"2"], "b")
    assert affinity.choose([b"1", b"2", b"3"], {"a": 0, "b": MOST_AHEAD}) == "b"


def test_the_longest_known_beginning_counts():
    affinity = Affinity()
    affinity.record([b"1", b"2"], "a")
    affinity.record([b"1"], "b")
    assert affinity.choose([b"1", b"2"], {"a": 2, "b": 0}) == "a"


def test_a_busy_replica_does_not_get_all_that_begins_alike():
    affinity = Affinity()
    affinity.record([b"1"], "b")
    assert affinity.choose([b"1"], {"a": 0, "b": MOST_AHEAD + 1}) == "a"
    affinity.record([b"1"], "a")
    assert affinity.choose([b"1"], {"a": 2, "b": 1}) == "b"


def test_a_replica_that_is_gone_gets_nothing():
    affinity = Affinity()
    affinity.record([b"1"], "gone")
    assert affinity.choose([b"1"], {"a": 3}) == "a"


def test_what_nobody_knows_goes_to_the_least_busy_and_takes_turns():
    affinity = Affinity()
    chosen = []
    for number in range(6):
        chosen.append(affinity.choose([b"%d" % number], {"a": 0, "b": 0, "c": 1}))
        affinity.record([b"%d" % number], chosen[-1])
    assert chosen == ["a", "b"] * 3


def test_what_was_not_asked_for_the_longest_is_forgotten():
    affinity = Affinity(most_blocks=2)
    for digest in (b"1", b"2", b"1", b"3"):
        affinity.record([digest], "b")
    assert affinity.choose([b"1"], {"a": 0, "b": 1}) == "b"
    assert affinity.choose([b"2"], {"a": 0, "b": 1}) == "a"


def test_requests_that_come_at_once_take_turns_though_none_is_counted_yet():
    affinity = Affinity()
    for _ in range(3):
        affinity.choose([], {"a": 0, "b": 1})
    assert [affinity.choose([], {"a": 0, "b": 0}) for _ in range(4)] == ["b", "a", "b", "a"]
