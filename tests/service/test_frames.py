"""What is sent as it comes says the same as the answer in one piece, however its events are cut into rounds."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.answer import Completion, Event
from llama.service import ENDPOINTS, Call, Refusal
from llama.service.frames import deltas, json_line

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DIALOG = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")


def rounds(llm: Llama, call: Call) -> list[list[Event]]:
    return list(llm.engine.run(call.queries))


def chunks(text: str) -> list[dict]:
    *frames, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def joined(items: list[dict], url: str) -> dict[int, tuple]:
    """By choice: text, log-probabilities, finish reason."""
    found: dict[int, list] = {}
    for choice in (choice for chunk in items for choice in chunk["choices"]):
        text, logprobs, ends = found.setdefault(choice["index"], ["", [], []])
        text += choice["delta"].get("content") or "" if url == CHAT else choice["text"]
        if choice["logprobs"]:
            logprobs += choice["logprobs"]["content" if url == CHAT else "token_logprobs"]
        if choice["finish_reason"]:
            ends.append(choice["finish_reason"])
        found[choice["index"]][0] = text
    return {index: (text, logprobs, *ends) for index, (text, logprobs, ends) in found.items()}


BODIES = [
    (CHAT, {"messages": DIALOG, "max_tokens": 9}),
    (CHAT, {"messages": DIALOG, "max_tokens": 9, "n": 3, "temperature": 1.0, "seed": 5}),
    (CHAT, {"messages": DIALOG, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "[INST]"}]}),  # refused by the format
    (TEXT, {"prompt": "abc", "max_tokens": 9}),
    (TEXT, {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 9, "seed": 5}),
    (TEXT, {"prompt": "abc", "max_tokens": 6, "logprobs": 1}),
    (TEXT, {"prompt": "abc", "max_tokens": 6, "echo": True}),
    (TEXT, {"prompt": "abc", "max_tokens": 6, "echo": True, "logprobs": 1}),
]


@pytest.mark.parametrize(("url", "body"), BODIES)
@pytest.mark.parametrize("at_once", [False, True])
def test_the_frames_say_what_the_response_says(llm, url, body, at_once):
    call = Call.open(llm, ENDPOINTS[url], {**body, "stream": True}, can_stream=True)
    events = rounds(llm, call)
    completions = [event.completion for step in events for event in step if event.completion]
    frames = call.frames(llm)
    text = (
        "".join(map(frames.push, [[event for step in events for event in step]] if at_once else events)) + frames.end()
    )
    response = call.respond(llm, completions)
    for index, choice in enumerate(response["choices"]):
        said, logprobs, reason = joined(chunks(text), url)[index]
        if url == CHAT:
            assert said == (choice["message"]["content"] if reason != "content_filter" else "")
            assert logprobs == ((choice["logprobs"] or {}).get("content") or [])
        else:
            assert said == choice["text"]
            assert logprobs == ((choice["logprobs"] or {}).get("token_logprobs") or [])
        assert reason == choice["finish_reason"]


def test_a_chat_stream_begins_with_the_role_and_ends_without_content(llm):
    call = Call.open(llm, ENDPOINTS[CHAT], {"messages": DIALOG, "max_tokens": 4, "stream": True}, can_stream=True)
    frames = call.frames(llm)
    found = chunks("".join(map(frames.push, rounds(llm, call))) + frames.end())
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in found[1:])
    assert found[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert len({(chunk["id"], chunk["created"]) for chunk in found}) == 1


@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_usage_comes_in_a_last_chunk_or_in_every_one(llm, url):
    asked = {"messages": DIALOG} if url == CHAT else {"prompt": "abc"}
    for every in (False, True):
        options = {"include_usage": True, "continuous_usage_stats": every}
        body = {**asked, "max_tokens": 4, "ignore_eos": True, "stream": True, "stream_options": options}
        call = Call.open(llm, ENDPOINTS[url], body, can_stream=True)
        frames = call.frames(llm)
        *found, last = chunks("".join(map(frames.push, rounds(llm, call))) + frames.end())
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
        counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in found]
        assert counts == sorted(counts) if every else set(counts) == {None}


def test_a_prompt_that_the_cache_knows_is_told_in_the_usage(llm):
    call = Call.open(llm, ENDPOINTS[TEXT], {"prompt": "x" * 40, "max_tokens": 1})
    for _ in range(2):
        response = call.respond(llm, list(llm.run(call.queries)))
    assert response["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


def test_another_salt_shares_nothing(llm):
    body = {"prompt": "y" * 40, "max_tokens": 1}
    for salt, cached in ((b"a", 0), (b"b", 0), (b"a", 32)):
        call = Call.open(llm, ENDPOINTS[TEXT], body, salt=salt)
        usage = call.respond(llm, list(llm.run(call.queries)))["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached


def test_an_error_in_the_midst_is_told_and_then_done(llm):
    call = Call.open(llm, ENDPOINTS[CHAT], {"messages": DIALOG, "stream": True}, can_stream=True)
    [error] = chunks(call.frames(llm).fail(Refusal("out of luck", kind="server_error")))
    assert error == {"error": {"message": "out of luck", "type": "server_error", "param": None, "code": None}}


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_a_frame_stands_on_one_line_and_reads_back(text):
    assert json.loads(json_line(text)) == text
    assert len(json_line(text).splitlines()) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=30))
def test_joining_events_loses_none(pairs):
    found = deltas([Event(0, index, token=1, text=text) for index, text in pairs])
    for delta in found:
        assert delta.text == "".join(text for index, text in pairs if index == delta.index)
        assert len(delta.tokens) == sum(index == delta.index for index, _ in pairs)


def test_the_last_event_brings_its_completion():
    completion = Completion("ab", [1, 2], "stop")
    [delta] = deltas([Event(0, 0, 1, "a"), Event(0, 0, 2, "b", completion=completion)])
    assert (delta.text, delta.finish_reason) == ("ab", "stop")
