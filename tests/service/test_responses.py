"""OpenAI's responses: what a body means, and that the events of a stream make what the answer in one piece is."""

import json
import time
from itertools import pairwise

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import named_events
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.answer import Completion, Event, Logprob
from llama.service import ENDPOINTS, Call, Refusal, failure

URL = "/v1/responses"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "description": "How it is there.", "parameters": CITY, "strict": True}
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=8, max_seq_len=2048)), ByteTokenizer(), chat_format="vicuna")


def opened(llm: Llama, **fields: object) -> Call:
    body = {"input": "hi", "max_output_tokens": 8, "temperature": 0, **fields}
    return Call.open(llm, ENDPOINTS[URL], body, can_stream=True)


def respond(llm: Llama, **fields: object) -> dict:
    call = opened(llm, **fields)
    return call.respond(llm, list(llm.run(call.queries)))


def prompt(llm: Llama, **fields: object) -> str:
    return llm.tokenizer.decode(opened(llm, **fields).queries[0].tokens)


def events(text: str) -> list[dict]:
    """The data of each event, numbered as they come."""
    found = named_events(text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def rebuilt(found: list[dict]) -> dict:
    """The response that a client has who follows the events, each of which fits what was told before it."""
    created, in_progress, *changes, last = found
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    items: list[dict] = []
    for event in changes:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        item = items[-1]
        assert event["output_index"] == len(items) - 1
        if kind == "output_item.done":
            items[-1] = item | {"status": event["item"]["status"]}
            assert items[-1] == event["item"]
            continue
        assert event["item_id"] == item["id"]
        what = item if item["type"] == "function_call" else (item["content"] or [{}])[0]
        name = {"function_call_arguments": "arguments", "output_text": "text"}.get(kind.split(".")[0], "refusal")
        if kind == "content_part.added":
            item["content"] = [event["part"]]
        elif kind == "content_part.done":
            assert event["part"] == what
        elif kind.endswith(".delta"):
            what[name] += event["delta"]
            if kind == "output_text.delta":
                what["logprobs"] += event["logprobs"]
        else:
            assert kind.endswith(".done")
            assert event[name] == what[name]
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["output"] == items
    return last["response"]


def comparable(response: dict) -> dict:
    """Without what is drawn anew each time that an answer is read."""
    output = [{**item, "call_id": "drawn"} if "call_id" in item else item for item in response["output"]]
    return {**response, "output": output, "completed_at": response["completed_at"] is not None}


def streamed(llm: Llama, **fields: object) -> tuple[dict, dict]:
    """What a stream's events make, and the response made of the same completion."""
    call = opened(llm, stream=True, **fields)
    frames, text, completions = call.frames(llm), "", []
    for step in llm.engine.run(call.queries):
        text += frames.push(step)
        completions += [event.completion for event in step if event.completion]
    return rebuilt(events(text + frames.end())), call.respond(llm, completions)


# ---- the response


def test_a_response_has_the_parts_that_clients_read(llm):
    response = respond(llm, metadata={"for": "a test"}, instructions="Be brief.")
    assert response["object"] == "response"
    assert response["id"].startswith("resp_")
    [query] = opened(llm, instructions="Be brief.").queries
    [expected] = llm.complete([query.tokens], query.params)
    [message] = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    assert message["content"] == [{"type": "output_text", "text": expected.text, "annotations": [], "logprobs": []}]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["usage"]["input_tokens"] == len(query.tokens)
    assert response["usage"]["output_tokens"] == 8
    assert response["usage"]["total_tokens"] == len(query.tokens) + 8
    given = {"metadata": {"for": "a test"}, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 8}
    assert {name: response[name] for name in given} == given
    assert (response["store"], response["completed_at"], response["error"]) == (False, None, None)


def test_an_answer_that_the_model_ends_is_completed(llm):
    response = respond(llm, logit_bias={"257": 100})
    assert (response["status"], response["incomplete_details"]) == ("completed", None)
    assert response["completed_at"] - time.time() < 1
    assert response["output"][0]["content"][0]["text"] == ""
    assert response["output"][0]["status"] == "completed"


@pytest.mark.parametrize(
    "fields",
    [
        dict(input=[{"role": "user", "content": "hi"}]),
        dict(input=[{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}]),
        dict(input=[{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "hi"}]),
        dict(store=True, user="u", reasoning={"effort": "low"}, service_tier="auto", text={"verbosity": "low"}),
        dict(background=False, previous_response_id=None, truncation="disabled", stream_options={}, tools=[]),
        dict(include=["reasoning.encrypted_content"], prompt_cache_key="k", text={"format": {"type": "text"}}),
        dict(max_tokens=3),
    ],
)
def test_what_says_the_same_is_taken_as_the_same(llm, fields):
    assert respond(llm, **fields)["output"][0]["content"] == respond(llm)["output"][0]["content"]


def test_items_become_one_dialog(llm):
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "How is it there?"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "They ask."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": "commentary",
         "content": [{"type": "output_text", "text": "I ask.", "annotations": [], "parsed": None}]},
        {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "weather", "arguments": '{"city": "Oslo"}',
         "parsed_arguments": {}},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "snow"}]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    calls = WEATHER + '\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    results = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsnow\n</tool_response>"
    said = prompt(llm, instructions="Be brief.", input=items)
    assert said == (
        f"Be brief.\nBe kind. USER: How is it there? ASSISTANT: I ask.\n{calls}USER: {results}\nAnd? ASSISTANT:"
    )


def test_tools_are_told_of_as_chats_tell_of_them(llm):
    nested = {"type": "function", "function": {name: TOOL[name] for name in TOOL if name != "type"}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [nested]}
    [chat] = Call.open(llm, ENDPOINTS["/v1/chat/completions"], body).queries
    [query] = opened(llm, tools=[TOOL]).queries
    assert query.tokens == chat.tokens
    assert query.params.grammar == chat.params.grammar is not None
    other = {**TOOL, "name": "other"}
    named = [{"type": "function", "name": "weather"}]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": named}
    assert opened(llm, tools=[TOOL, other], tool_choice=allowed).queries[0].tokens == chat.tokens
    assert opened(llm, tools=[TOOL], tool_choice="none").queries[0].tokens == opened(llm).queries[0].tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_that_is_required_is_an_item_with_valid_arguments(llm, choice):
    asked = dict(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=300, temperature=1.2)
    stream, response = streamed(llm, **asked, seed=1)
    [call] = response["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    jsonschema.validate(json.loads(call["arguments"]), CITY)
    assert response["status"] == "completed"
    assert (response["tool_choice"], response["tools"]) == (choice, [TOOL])
    assert comparable(stream) == comparable(response)


@pytest.mark.parametrize("strict", [True, False])
def test_a_text_has_the_format_that_is_asked_for(llm, strict):
    wanted = {"type": "json_schema", "name": "city", "schema": CITY, "strict": strict}
    asked = dict(text={"format": wanted}, max_output_tokens=100, temperature=1.2, seed=2)
    response = respond(llm, **asked)
    jsonschema.validate(json.loads(response["output"][0]["content"][0]["text"]), CITY)
    assert response["text"] == {"format": wanted}
    assert opened(llm, text={"format": {"type": "json_object"}}).queries[0].params.json_schema == '{"type": "object"}'


# ---- the stream


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(temperature=1.0, seed=5, max_output_tokens=30),
        dict(logit_bias={"257": 100}),
        LOGPROBS,
        dict(LOGPROBS, top_logprobs=0, temperature=1.0, seed=5, max_output_tokens=30),
        dict(tools=[TOOL], temperature=1.0, seed=3, max_output_tokens=20),
    ],
)
def test_a_stream_makes_what_the_response_is(llm, fields):
    stream, response = streamed(llm, **fields)
    assert comparable(stream) == comparable(response)


def test_with_every_text_come_the_logprobs_of_its_tokens(llm):
    content = respond(llm, **LOGPROBS)["output"][0]["content"][0]
    assert b"".join(bytes(entry["bytes"]) for entry in content["logprobs"]).decode(errors="replace") == content["text"]
    assert all(len(entry["top_logprobs"]) == 1 for entry in content["logprobs"])
    assert respond(llm, include=LOGPROBS["include"])["output"][0]["content"][0]["logprobs"][0]["top_logprobs"] == []


def test_what_the_chat_format_refuses_is_a_refusal():
    llm = Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")
    stream, response = streamed(llm, input="[INST]")
    [part] = response["output"][0]["content"]
    assert part["type"] == "refusal"
    assert part["refusal"].startswith("Error: ")
    assert comparable(stream) == comparable(response)


def came(text: str, reason: str = "stop", has_logprobs: bool = False) -> list[Event]:
    """An answer of this text, a byte a token, as the engine tells of it."""
    tokens = [*text.encode()]
    logprobs = [Logprob(token, -1.0, ((token, -1.0),)) if has_logprobs else None for token in tokens]
    stream = ByteTokenizer.codec.stream()
    found = [Event(0, 0, token, stream.push(token), logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
    return [*found, Event(0, 0, completion=Completion(text, tokens, reason, logprobs if has_logprobs else None))]


ANSWERS = [
    "Plain text, ä and 好.",
    WEATHER,
    f"Let me see.\n{WEATHER}\n{WEATHER}",
    f"First. {WEATHER} Then. {WEATHER} Last.",
    f"{WEATHER[:50]}",
    "<tool_call>no call</tool_call>",
    "ends in <tool_ca",
    "",
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(ANSWERS),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_it_makes_no_difference_in_which_rounds_an_answer_comes(llm, text, reason, has_logprobs, cuts):
    call = opened(llm, tools=[TOOL], stream=True, **(LOGPROBS if has_logprobs else {}))
    happened = came(text, reason, has_logprobs)
    places = sorted({0, *(min(cut, len(happened)) for cut in cuts), len(happened)})
    frames = call.frames(llm)
    sent = "".join(frames.push(happened[a:b]) for a, b in pairwise(places)) + frames.end()
    response = call.respond(llm, [happened[-1].completion])
    assert comparable(rebuilt(events(sent))) == comparable(response)
    assert response["status"] == ("incomplete" if reason == "length" else "completed")
    assert response["output"][-1]["status"] == response["status"]


def test_text_and_calls_are_items_in_their_order(llm):
    call = opened(llm, tools=[TOOL])
    output = call.respond(llm, [came(ANSWERS[3])[-1].completion])["output"]
    said = [item["content"][0]["text"] if item["type"] == "message" else item["arguments"] for item in output]
    assert said == ["First.", '{"city": "Oslo"}', "Then.", '{"city": "Oslo"}', "Last."]
    assert len({item["id"] for item in output}) == len(output)


@pytest.mark.parametrize("num_events", [0, 5])
def test_an_error_in_the_midst_is_a_response_that_failed(llm, num_events):
    frames = opened(llm, stream=True).frames(llm)
    sent = "".join(frames.push([event]) for event in came("Plain text")[:num_events])
    response = rebuilt(events(sent + frames.fail(failure("out of luck"))))
    assert (response["status"], response["error"]["message"]) == ("failed", "out of luck")
    assert [item["status"] for item in response["output"]] == ["incomplete"] * (num_events > 0)


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (dict(input=None), "input"),
        (dict(input=[]), "input"),
        (dict(input=[{"type": "item_reference", "id": "msg_1"}]), "input.0"),
        (dict(input=[{"type": ["message"]}]), "input.0"),
        (dict(input=[{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]), "input.1.role"),
        (dict(input=[{"role": "user"}]), "input.0.content"),
        (dict(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]), "input.0.content"),
        (dict(input=[{"role": "user", "content": [{"type": "input_text"}]}]), "input.0.content"),
        (dict(input=[{"type": "function_call_output", "call_id": "a", "output": 7}]), "input.0.output.str"),
        (dict(input=[{"type": "function_call", "call_id": "a", "name": "f"}]), "input.0.arguments"),
        (dict(input="x" * 3000), "input"),
        (dict(previous_response_id="resp_1"), "previous_response_id"),
        (dict(conversation="conv_1"), "conversation"),
        (dict(background=True), "background"),
        (dict(prompt={"id": "pmpt_1"}), "prompt"),
        (dict(truncation="auto"), "truncation"),
        (dict(n=2), "n"),
        (dict(top_logprobs=21), "top_logprobs"),
        (dict(max_output_tokens=0), "max_output_tokens"),
        (dict(temperature="hot"), "temperature"),
        (dict(something_new=1), "something_new"),
        (dict(tools=[{"type": "web_search"}]), "tools.0.type"),
        (dict(tools=[TOOL, TOOL]), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(tools=[TOOL], tool_choice={"type": "function", "name": "nobody"}), "tool_choice"),
        (dict(text={"format": {"type": "json_schema", "name": "f"}}), "text.format.schema"),
        (dict(text={"format": {"type": "json_schema", "schema": {"not": {}}, "strict": True}}), "text"),
        (dict(text={"format": {"type": "json_object"}}, regex="a"), "text"),
        (dict(regex="a", tools=[TOOL]), "tools"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(llm, fields, param):
    with pytest.raises(Refusal) as refused:
        opened(llm, **fields)
    assert refused.value.param == param
