"""Tools over Anthropic's messages: blocks of calls and of results, streamed or not."""

import json

import jsonschema
import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.answer import Completion, Event
from llama.service import ENDPOINTS, Call, Refusal

MESSAGES = ENDPOINTS["/v1/messages"]
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"name": "weather", "description": "How it is there.", "input_schema": PLACE}]
USER = {"role": "user", "content": "hi"}
CALL = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
BASIC = {"model": "m", "messages": [USER], "max_tokens": 200, "tools": TOOLS, "temperature": 1.0}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=8, max_seq_len=2048)), ByteTokenizer(), chat_format="vicuna")


def opened(llm: Llama, **fields: object) -> Call:
    return Call.open(llm, MESSAGES, {**BASIC, **fields}, can_stream=True)


def events(text: str) -> list[dict]:
    return [json.loads(frame.split("data: ", 1)[1]) for frame in text.split("\n\n")[:-1]]


CHOICES = [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_call_that_is_required_is_a_block_with_its_input(llm, choice):
    call = opened(llm, tool_choice=choice)
    happened = list(llm.engine.run(call.queries))
    completions = [event.completion for step in happened for event in step if event.completion]
    message = call.respond(llm, completions)
    [block] = message["content"]
    assert (block["type"], block["name"]) == ("tool_use", "weather")
    jsonschema.validate(block["input"], PLACE)
    assert message["stop_reason"] == "tool_use"

    frames = opened(llm, tool_choice=choice, stream=True).frames(llm)
    found = events("".join(map(frames.push, happened)) + frames.end())
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert found[1]["content_block"] == {**block, "id": found[1]["content_block"]["id"], "input": {}}
    pieces = [event["delta"]["partial_json"] for event in found[2:-3]]
    assert json.loads("".join(pieces)) == block["input"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


def test_blocks_have_indices_in_a_row(llm):
    """Text, then two calls: one block each, none begun before the last one has ended."""
    call = opened(llm, stream=True)
    frames = call.frames(llm)
    text = 'Well. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    text += '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    parts = [Event(0, 0, 1, piece) for piece in text] + [Event(0, 0, completion=Completion(text, [], "stop"))]
    found = events("".join(frames.push([part]) for part in parts) + frames.end())
    order = [(event["type"][14:], event["index"]) for event in found if event["type"].startswith("content_block_")]
    marks = [(kind, index) for kind, index in order if kind != "delta"]
    assert marks == [(kind, index) for index in range(3) for kind in ("start", "stop")]
    assert [index for _, index in order] == sorted(index for _, index in order)


def test_calls_and_results_come_back_into_the_dialog(llm):
    dialog = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, CALL]}]
    dialog.append({"role": "user", "content": [RESULT, {"type": "text", "text": "So?"}]})
    messages = opened(llm, messages=dialog).body.chat_prompt().messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert (messages[2]["content"], messages[2]["tool_call_id"]) == ("rain", "call_1")


def test_a_turn_of_calls_alone_is_not_gone_on_from(llm):
    with pytest.raises(Refusal):
        opened(llm, messages=[USER, {"role": "assistant", "content": [{**CALL, "input": "Oslo"}]}])
    assert not opened(llm, messages=[USER, {"role": "assistant", "content": [CALL]}]).body.chat_prompt().continues


def test_tools_count(llm):
    count = ENDPOINTS["/v1/messages/count_tokens"]

    def tokens(**fields: object) -> int:
        return Call.open(llm, count, {"model": "m", "messages": [USER], **fields}).respond(llm, [])["input_tokens"]

    assert tokens(tools=TOOLS) == len(opened(llm).queries[0].tokens) > tokens()
