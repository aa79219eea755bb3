"""Anthropic's messages: what a body means, and that the stream says what the answer in one piece does."""

from dataclasses import replace

import pytest
from support.events import named_events
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.service import ENDPOINTS, Call, Refusal, failure

URL = "/v1/messages"
USER = {"role": "user", "content": "hi"}
GREEDY = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")


def opened(llm: Llama, url: str = URL, **fields: object) -> Call:
    body = {"messages": [USER], **(GREEDY if url == URL else {}), **fields}
    return Call.open(llm, ENDPOINTS[url], body, can_stream=True)


def respond(llm: Llama, **fields: object) -> dict:
    call = opened(llm, **fields)
    return call.respond(llm, list(llm.run(call.queries)))


def prompt(llm: Llama, **fields: object) -> str:
    [query] = opened(llm, **fields).queries
    return llm.tokenizer.decode(query.tokens)


def streamed(llm: Llama, **fields: object) -> tuple[list[dict], dict]:
    """The events of a stream, and the response made of the same completion."""
    call = opened(llm, stream=True, **fields)
    frames, text, completions = call.frames(llm), "", []
    for step in llm.engine.run(call.queries):
        text += frames.push(step)
        completions += [event.completion for event in step if event.completion]
    return named_events(text + frames.end()), call.respond(llm, completions)


def test_a_message_has_the_parts_that_clients_read(llm):
    message = respond(llm)
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["id"].startswith("msg_")
    [query] = opened(llm).queries
    [expected] = llm.complete([query.tokens], query.params)
    assert message["content"] == [{"type": "text", "text": expected.text, "citations": None}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    usage = message["usage"]
    assert usage["output_tokens"] == 8
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(query.tokens)
    assert usage["input_tokens"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        dict(messages=[{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}]}]),
        dict(
            messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            tools=[],
            tool_choice={"type": "auto"},
        ),
        dict(thinking={"type": "enabled", "budget_tokens": 1024}, metadata={"user_id": "u"}, system=None),
        dict(service_tier="auto", output_config={"effort": "low"}, context_management={}),
    ],
)
def test_what_says_the_same_is_taken_as_the_same(llm, fields):
    assert respond(llm, **fields)["content"] == respond(llm)["content"]


def test_system_and_turns_become_one_dialog(llm):
    blocks = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    system = "<<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\n"
    assert prompt(llm, system=blocks, messages=turns) == f"[INST] {system}a\nb [/INST] c [INST] d [/INST]"
    assert prompt(llm, system="Be brief.\nBe kind.") == f"[INST] {system}hi [/INST]"


def test_a_last_message_of_the_assistants_is_gone_on_from(llm):
    begun = [USER, {"role": "assistant", "content": "Well, "}]
    assert prompt(llm, messages=begun) == "[INST] hi [/INST] Well, "


def test_the_stop_sequence_that_ended_the_answer_is_told(llm):
    text = respond(llm)["content"][0]["text"]
    stop = text[2]
    message = respond(llm, stop_sequences=["never", stop])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text[: text.index(stop)]


def test_a_turn_that_the_model_ends_is_its_own(llm):
    call = opened(llm)
    params = replace(call.queries[0].params, logit_bias={llm.tokenizer.eos_id: 1e9})
    message = call.respond(llm, llm.complete([call.queries[0].tokens], params))
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"]["output_tokens"] == 0


def test_what_the_chat_format_refuses_is_a_refusal(llm):
    message = respond(llm, messages=[{"role": "user", "content": "[INST]"}])
    assert message["stop_reason"] == "refusal"
    assert message["content"][0]["text"].startswith("Error: ")


@pytest.mark.parametrize("stop", [[], ["Z"]])
def test_the_stream_says_what_the_message_says(llm, stop):
    found, message = streamed(llm, stop_sequences=stop)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert {event["index"] for event in found if "index" in event} == {0}
    opening = found[0]["message"]
    assert (opening["content"], opening["stop_reason"], opening["usage"]["output_tokens"]) == ([], None, 0)
    assert opening["usage"]["input_tokens"] > 0
    assert opening["id"] == message["id"]
    said = "".join(event["delta"]["text"] for event in found[2:-3])
    assert [found[1]["content_block"] | {"text": said}] == message["content"]
    assert found[-2]["delta"] == {name: message[name] for name in ("stop_reason", "stop_sequence")}
    assert found[-2]["usage"] == message["usage"]


def test_an_error_in_the_midst_is_an_event_and_nothing_follows(llm):
    [event] = named_events(opened(llm, stream=True).frames(llm).fail(failure("out of luck")))
    assert event == {"type": "error", "error": {"type": "api_error", "message": "out of luck"}}
    assert named_events(opened(llm, stream=True).frames(llm).ping) == [{"type": "ping"}]


def test_tokens_are_counted_without_an_answer(llm):
    def count(**fields: object) -> int:
        call = opened(llm, f"{URL}/count_tokens", **fields)
        assert call.queries == []
        return call.respond(llm, [])["input_tokens"]

    assert count() == len(opened(llm).queries[0].tokens)
    assert count(system="Be brief.") > count()
    assert count(messages=[USER, {"role": "assistant", "content": "well"}]) == count() + len(" well")
    with pytest.raises(Refusal, match=r"^model only supports"):
        count(messages=[{"role": "assistant", "content": "a"}, USER])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tools=[{"type": "web_search_20250305", "name": "f"}]), "tools.0.type: .*custom"),
        (dict(tool_choice={"type": "tool", "name": "f"}), "tool_choice names 'f': there are none"),
        (dict(tool_choice={"type": "tool"}), "give the name of the tool to call"),
        (dict(max_tokens=None), "max_tokens: Field required"),
        (dict(max_tokens=0), "max_tokens: "),
        (dict(messages=[]), "messages: "),
        (dict(messages=None), "messages: Field required"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}]),
            "type 'image' that has no place there",
        ),
        (dict(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages.0.content has a block"),
        (dict(messages=[{"role": "tool", "content": "x"}]), "messages.0.role: "),
        (dict(messages=[{"role": "assistant", "content": "x"}]), "nothing but an answer to continue"),
        (dict(messages=[{"role": "user", "content": "x" * 300}]), "the prompt has "),
        (dict(temperature="hot"), "temperature: "),
        (dict(n=2), "n: "),
        (dict(output_config={"format": {"type": "xml"}}), "output_config.format.type: .*json_schema"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_anthropics_form(llm, fields, message):
    with pytest.raises(Refusal, match=message) as error:
        opened(llm, **fields)
    body = ENDPOINTS[URL].error_json(error.value)
    assert body == {"type": "error", "error": {"type": "invalid_request_error", "message": str(error.value)}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_an_errors_type_is_that_of_its_status(status, kind):
    assert ENDPOINTS[URL].error_json(Refusal("no", status=status))["error"]["type"] == kind
