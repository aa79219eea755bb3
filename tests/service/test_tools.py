"""Tools over OpenAI's chat completions: what is asked for is called, streamed or not."""

import json
from itertools import pairwise

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama, SamplingParams
from llama.answer import Completion, Event
from llama.chat.tools import TOOL_FORMATS, Spoken, ToolCall, ToolError, ToolUse, describe
from llama.constraints import Constraints
from llama.service import ENDPOINTS, Call, Refusal
from llama.service.frames import deltas
from llama.service.tools import AnswerReader

CHAT = ENDPOINTS["/v1/chat/completions"]
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "day": {"$ref": "#/$defs/day"}},
    "required": ["city", "day"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 0, "maximum": 9}},
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": PLACE, "now": EMPTY}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
USER = [{"role": "user", "content": "hi"}]
NAMED = {"type": "function", "function": {"name": "now"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=8, max_seq_len=2048)), ByteTokenizer(), chat_format="vicuna")


def asked(llm: Llama, **fields: object) -> tuple[dict, list[dict]]:
    """The one choice of an answer, and the chunks of the same one streamed."""
    body = {"messages": USER, "tools": TOOLS, "max_tokens": 300, "temperature": 1.2, "seed": 5, **fields}
    call = Call.open(llm, CHAT, body)
    [choice] = call.respond(llm, list(llm.run(call.queries)))["choices"]
    call = Call.open(llm, CHAT, {**body, "stream": True}, can_stream=True)
    frames = call.frames(llm)
    text = "".join(frames.push([event]) for event in llm.stream(call.queries[0])) + frames.end()
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    return choice, [chunk["choices"][0] for chunk in chunks]


def joined(chunks: list[dict]) -> dict:
    """What OpenAI's client makes of chunks: texts of one place are joined."""
    calls: dict[int, dict] = {}
    for chunk in chunks:
        for part in chunk["delta"].get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            call["id"] += part.get("id", "")
            call["name"] += part["function"].get("name", "")
            call["arguments"] += part["function"]["arguments"]
    content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    return {"content": content or None, "calls": [(c["name"], c["arguments"]) for c in calls.values()]}


@pytest.mark.parametrize("format", TOOL_FORMATS)
@pytest.mark.parametrize(
    ("choice", "parallel", "reason"),
    [("required", False, "tool_calls"), ("required", True, "tool_calls"),
     ({"type": "function", "function": {"name": "weather"}}, True, "stop")],
)  # fmt: skip
def test_a_call_that_is_required_comes_with_valid_arguments(llm, monkeypatch, format, choice, parallel, reason):
    monkeypatch.setattr(llm.chat_format, "tool_format", TOOL_FORMATS[format](), raising=False)
    bias = {"257": 3, str(ord("'")): 4, str(ord('"')): 3}
    found, chunks = asked(llm, tool_choice=choice, parallel_tool_calls=parallel, logit_bias=bias)
    assert found["finish_reason"] in (reason, "length")
    calls = found["message"].get("tool_calls", [])
    if found["finish_reason"] == "length":
        return
    assert found["message"]["content"] is None
    assert calls
    assert len(calls) == 1 or (parallel and choice == "required")
    for call in calls:
        assert call["type"] == "function"
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, SCHEMAS[call["function"]["name"]])
    streamed = joined(chunks)
    assert streamed == {
        "content": None, "calls": [(c["function"]["name"], c["function"]["arguments"]) for c in calls]
    }  # fmt: skip
    assert chunks[-1]["finish_reason"] == found["finish_reason"]
    assert chunks[0]["delta"] == {"role": "assistant", "content": None}


def test_an_answer_that_calls_nothing_is_text(llm):
    found, chunks = asked(llm, max_tokens=12)
    assert "tool_calls" not in found["message"]
    assert joined(chunks) == {"content": found["message"]["content"] or None, "calls": []}


def test_without_a_choice_tools_are_not_told_of(llm):
    plain, none = (
        Call.open(llm, CHAT, {"messages": USER, **fields}).queries[0].tokens
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"})
    )
    assert plain == none
    assert len(Call.open(llm, CHAT, {"messages": USER, "tools": TOOLS}).queries[0].tokens) > len(plain)


@pytest.mark.parametrize("choice", ["auto", "none", NAMED, ALLOWED])
def test_tokenize_and_apply_template_tell_of_tools_as_a_chat_does(llm, choice):
    body = {"messages": USER, "tools": TOOLS, "tool_choice": choice}
    tokens = Call.open(llm, CHAT, body).queries[0].tokens
    assert Call.open(llm, ENDPOINTS["/tokenize"], body).respond(llm, [])["tokens"] == tokens
    text = Call.open(llm, ENDPOINTS["/apply-template"], body).respond(llm, [])["prompt"]
    assert text.removeprefix("<s>") == llm.tokenizer.decode(list(tokens))


def test_a_developer_is_the_system(llm):
    dialogs = [[{"role": role, "content": "Be brief."}, *USER] for role in ("developer", "system")]
    told = [Call.open(llm, CHAT, {"messages": dialog}).queries[0].tokens for dialog in dialogs]
    assert told[0] == told[1]


def test_calls_and_results_are_part_of_a_dialog(llm):
    dialog = [
        *USER,
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]  # fmt: skip
    [query] = Call.open(llm, CHAT, {"messages": dialog, "tools": TOOLS}).queries
    assert '"name": "now", "arguments": {}' in llm.tokenizer.decode(list(query.tokens))
    assert "noon" in llm.tokenizer.decode(list(query.tokens))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (dict(tools=[{"type": "function"}]), "tools"),
        (dict(tools=[*TOOLS, TOOLS[0]]), "tools"),
        (dict(tools=[], tool_choice="required"), "tool_choice"),
        (dict(tool_choice={"type": "function", "function": {"name": "nobody"}}), "tool_choice"),
        (dict(tools=[{"type": "function", "function": 7}], tool_choice=ALLOWED), "tool_choice"),
        (dict(tool_choice="required", regex="a"), "tools"),
        (dict(tools=[STRICT | {"function": {"name": "f", "strict": True}}], regex="a"), "tools"),
        (
            dict(tools=[{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]),
            "grammar",
        ),
    ],
)
def test_what_cannot_be_offered_is_refused(llm, fields, param):
    with pytest.raises(Refusal) as refused:
        Call.open(llm, CHAT, {"messages": USER, "tools": TOOLS, **fields})
    assert refused.value.param == param


def test_parameters_that_are_nested_without_end_are_refused():
    deep: dict = {"type": "string"}
    for _ in range(2000):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(ToolError, match="'f' are nested more than 64 deep"):
        ToolUse([{"type": "function", "function": {"name": "f", "parameters": deep}}])


@pytest.mark.parametrize("format", TOOL_FORMATS)
@pytest.mark.parametrize("strict", [False, True])
def test_beside_a_schema_an_answer_is_a_call_or_what_the_schema_describes(format, strict):
    """Agents have an output of a class and tools: what they find out by calls they say as an object."""
    tokenizer = ByteTokenizer()
    tool = {"type": "function", "function": {"name": "now", "strict": strict, "parameters": EMPTY}}
    kind = TOOL_FORMATS[format]()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "x-guidance": None}
    constraints = Constraints(tokenizer, 264, tokenizer.stop_ids)

    def takes(text: str, choice: str = "auto") -> bool:
        grammar = ToolUse([tool], choice).grammar(kind, schema)
        matcher = constraints.matcher(SamplingParams(grammar=grammar), tokenizer.stop_ids)
        for token in text.encode():
            if not matcher.allowed()[token >> 3] >> (token & 7) & 1:
                return False
            matcher.take(token)
        return bool(matcher.allowed()[257 >> 3] >> (257 & 7) & 1)

    called = kind.write([ToolCall("now", "{}")])
    assert [takes(text) for text in (called, '{"a": 1}', "Text.", '{"a": "b"}')] == [True, True, False, False]
    assert [takes(text, "required") for text in (called, '{"a": 1}')] == [True, False]


def test_beside_a_schema_tools_are_still_called(llm):
    found, _ = asked(llm, tool_choice="required", parallel_tool_calls=False, response_format={"type": "json_object"})
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] in SCHEMAS


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_one_call_is_made_at_most_where_they_may_not_be_parallel(format):
    tokenizer = ByteTokenizer()
    tool = {"type": "function", "function": {"name": "now", "parameters": EMPTY}}
    kind = TOOL_FORMATS[format]()
    constraints = Constraints(tokenizer, 264, tokenizer.stop_ids)
    assert ToolUse([tool]).grammar(kind) is None
    grammar = ToolUse([tool], parallel=False).grammar(kind)

    def takes(text: str) -> bool:
        matcher = constraints.matcher(SamplingParams(grammar=grammar), tokenizer.stop_ids)
        for token in text.encode():
            if not matcher.allowed()[token >> 3] >> (token & 7) & 1:
                return False
            matcher.take(token)
        return True

    call = ToolCall("now", "{}")
    assert takes(kind.write([call]))
    assert takes("Nothing to call.")
    assert not takes(kind.write([call, call]))
    assert not takes(f"{kind.write([call])}\n{kind.write([call])}")


def add(a: int, b: int = 1, *, how: str | None = None) -> int:
    """Adds two numbers."""
    return a + b


def test_a_python_function_is_a_tool(llm):
    function = describe(add)["function"]
    assert (function["name"], function["description"]) == ("add", "Adds two numbers.")
    assert function["parameters"]["required"] == ["a"]
    assert function["parameters"]["properties"]["b"] == {"default": 1, "title": "B", "type": "integer"}
    params = SamplingParams(max_tokens=200, temperature=1.2, seed=1)
    [completion] = llm.chat([USER], params, tools=[add], tool_choice="add")
    [call] = completion.tool_calls
    assert (call.name, completion.text) == ("add", "")
    if completion.finish_reason == "stop":
        jsonschema.validate(json.loads(call.arguments), function["parameters"])
    with pytest.raises(ToolError, match="nobody"):
        ToolUse([add], "nobody")


@pytest.mark.parametrize("format", TOOL_FORMATS)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("is_control", [False, True])
def test_a_strict_tools_arguments_are_kept_to_wherever_a_call_begins(format, parallel, is_control):
    tokenizer = ByteTokenizer()
    controls = dict.fromkeys(("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"), 258) if is_control else {}
    tool = {"type": "function", "function": {"name": "now", "strict": True, "parameters": EMPTY}}
    kind = TOOL_FORMATS[format](controls)
    grammar = ToolUse([tool], parallel=parallel).grammar(kind)
    constraints = Constraints(tokenizer, 264, tokenizer.stop_ids)

    def takes(text: str, tokens: tuple[int, ...] = ()) -> bool:
        matcher = constraints.matcher(SamplingParams(grammar=grammar), tokenizer.stop_ids)
        for token in (*tokens, *text.encode()):
            if not matcher.allowed()[token >> 3] >> (token & 7) & 1:
                return False
            matcher.take(token)
        return bool(matcher.allowed()[257 >> 3] >> (257 & 7) & 1)

    assert takes("It is noon.")
    assert takes("")
    [mark] = [mark for mark in ("<tool_call>", "[TOOL_CALLS]", "") if mark in (*kind.marks, "")][:1]
    written = kind.write([ToolCall("now", "{}")])
    wrong = written.replace("now", "then")
    for space, is_taken in ((" ", True), ("\n  ", True), ("\n\n", False), (" " * 17, False)):
        if "{" in written and not controls:  # JSON may be indented, and not go on for ever
            assert takes(written.replace("{", "{" + space, 1)) == is_taken
    has_control = is_control and bool(mark)
    texts = [text.removeprefix(mark) if has_control else text for text in (written, wrong)]
    assert [takes(text, (258,) * has_control) for text in texts] == [True, False]


@pytest.mark.parametrize(
    "text",
    [
        "Well. <tool_",
        'So <tool_call>{"name": "weather", "argum',
        '<tool_call>{"name": "weather", "arguments": {"city"',
        " ",
    ],
)
def test_what_is_held_back_at_the_end_of_a_stream_is_said_after_all(llm, text):
    """An answer may end in the midst of a mark, or of a call: in pieces it says what it says as a whole."""
    use = ToolUse(TOOLS)
    parts = [Event(0, 0, ord(c), c) for c in text]
    parts.append(Event(0, 0, completion=Completion(text, [*text.encode()], "length")))
    reader = AnswerReader(llm, use)
    streamed = Spoken.of(piece for part in parts for delta in deltas([part]) for piece in reader.read(delta))
    whole = llm.with_tool_calls(parts[-1].completion, use)
    assert streamed.content == whole.text
    assert [(c.name, c.arguments) for c in streamed.calls] == [(c.name, c.arguments) for c in whole.tool_calls]
    assert text.strip() == "" or streamed.content or streamed.calls


CALLS = [ToolCall("weather", '{"city": "Oslo", "day": 3}'), ToolCall("now", "{}")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.sampled_from(["", "Let me see. ", "ä <tool"]),
    st.integers(0, 2),
    st.sampled_from(["stop", "length"]),
    st.lists(st.integers(0, 150), max_size=9),
)
def test_it_makes_no_difference_in_which_rounds_calls_come(llm, format, text, num_calls, reason, cuts):
    kind = TOOL_FORMATS[format]()
    text += kind.write(CALLS[:num_calls]) if num_calls else ""
    stream, tokens = ByteTokenizer.codec.stream(), [*text.encode()]
    happened = [Event(0, 0, token, stream.push(token)) for token in tokens]
    happened.append(Event(0, 0, completion=Completion(text, tokens, reason)))
    call = Call.open(llm, CHAT, {"messages": USER, "tools": TOOLS, "stream": True}, can_stream=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.chat_format, "tool_format", kind, raising=False)
        frames = call.frames(llm)
        places = sorted({0, *(min(cut, len(happened)) for cut in cuts), len(happened)})
        sent = "".join(frames.push(happened[a:b]) for a, b in pairwise(places)) + frames.end()
        [choice] = call.respond(llm, [happened[-1].completion])["choices"]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in sent.split("\n\n")[:-2]]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"].get("tool_calls", ())]
    assert joined(chunks) == {"content": choice["message"]["content"] or None, "calls": calls}
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [choice["finish_reason"]]
    assert choice["finish_reason"] == ("length" if reason == "length" else "tool_calls" if calls else "stop")
