"""Calls of tools, read from what models write: in any pieces, whole or broken."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat.tools import TOOL_FORMATS, CallPiece, Spoken, ToolCall, ToolParser, parse_answer

NAMES = ("get_weather", "f", "brave_search")
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris", "days": [1, {"a": "}]\\""}]}}'
ARGUMENTS = '{"city": "Paris", "days": [1, {"a": "}]\\""}]}'
F = '{"name": "f", "parameters": {}}'


def said(format: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    spoken = parse_answer(TOOL_FORMATS[format](), NAMES, text)
    return spoken.content, [(call.name, call.arguments) for call in spoken.calls]


# Of each format: what a model wrote, the text in it and the calls.
ANSWERS = [
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", [("get_weather", ARGUMENTS)]),
    ("hermes", f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{F}\n</tool_call>\n", "",
     [("get_weather", ARGUMENTS), ("f", "{}")]),
    ("hermes", f"Let me see.\n\n<tool_call>\n{WEATHER}\n</tool_call>\n Done.", "Let me see.Done.",
     [("get_weather", ARGUMENTS)]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"id": 7, "type": "function", "name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "two\nlines\t\\u00e9\\ud83d\\ude00"}}</tool_call>', "",
     [("f", '{"s": "two\\nlines\\t\\u00e9\\ud83d\\ude00"}')]),
    ("smollm2", f"<tool_call>[{WEATHER}, {F}]</tool_call>", "", [("get_weather", ARGUMENTS), ("f", "{}")]),
    ("smollm2", "<tool_call>[]</tool_call>", "", []),
    ("llama3", WEATHER.replace("arguments", "parameters"), "", [("get_weather", ARGUMENTS)]),
    ("llama3", f"\n\n<|python_tag|>{WEATHER}", "", [("get_weather", ARGUMENTS)]),
    ("llama3", f"{WEATHER}; {F}", "", [("get_weather", ARGUMENTS), ("f", "{}")]),
    ("llama3", f"[{WEATHER}, {F}]", "", [("get_weather", ARGUMENTS), ("f", "{}")]),
    ("llama3", "[f(a='x', n=1), f()]", "", [("f", '{"a": "x", "n": 1}'), ("f", "{}")]),
    ("llama3", '<|python_tag|>brave_search.call(query="the ) sea")', "", [("brave_search", '{"query": "the ) sea"}')]),
    ("llama3", '<function=f>{"a": 1}</function>', "", [("f", '{"a": 1}')]),
    ("pythonic", "[get_weather(city='San Francisco, CA', deep={'a': [1, (2, None)]}), f(b=True)]", "",
     [("get_weather", '{"city": "San Francisco, CA", "deep": {"a": [1, [2, null]]}}'), ("f", '{"b": true}')]),
    ("mistral", f'[TOOL_CALLS] [{WEATHER[:-1]}, "id": "Xy12Zq34w"}}]', "", [("get_weather", ARGUMENTS)]),
    ("mistral", 'I will.[TOOL_CALLS]f[ARGS]{"a": "[ARGS]"}[TOOL_CALLS]get_weather[ARGS]{}', "I will.",
     [("f", '{"a": "[ARGS]"}'), ("get_weather", "{}")]),
]  # fmt: skip

# What is no call is text, to the letter.
TEXTS = [
    ("hermes", "Just an answer, 1 < 2 and <tool> is no tool.\n"),
    ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("hermes", "<tool_call>\nnot JSON\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "argu'),
    ("hermes", "ends in <tool_c"),
    ("hermes", " \n "),
    ("smollm2", '<tool_call>[{"arguments": {}}]</tool_call>'),
    ("llama3", '{"answer": 42, "why": "because"}'),
    ("llama3", '["a", "b"]'),
    ("llama3", "[1, 2]"),
    ("llama3", "<|python_tag|>print(1)"),
    ("llama3", '{"name": "f", "parameters"'),
    ("llama3", f"It is {F}"),
    ("pythonic", "[f(a=1, b=oops)]"),
    ("pythonic", "[f(a=1)"[:-1]),
    ("pythonic", "[unknown()]"),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS"),
]


@pytest.mark.parametrize(("format", "text", "content", "calls"), ANSWERS)
def test_calls_are_found_in_what_a_model_writes(format, text, content, calls):
    assert said(format, text) == (content, calls)
    for _, arguments in calls:
        json.loads(arguments)


@pytest.mark.parametrize(("format", "text"), TEXTS)
def test_what_is_no_call_is_text_to_the_letter(format, text):
    assert said(format, text) == (text, [])


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>{WEATHER[:60]}", "", [("get_weather", WEATHER[37:60])]),
        ("hermes", f"<tool_call>{F}</tool_c", "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "</tool_call>", [("f", '{"a": 1')]),
        ("hermes", f"<tool_call>{F} oops</tool_call>", "oops</tool_call>", [("f", "{}")]),
        ("smollm2", f'<tool_call>[{F}, {{"na', "", [("f", "{}")]),
        ("llama3", f"{F} and more", "and more", [("f", "{}")]),
    ],
)
def test_of_calls_that_are_cut_off_or_broken_what_there_is_is_kept(format, text, content, calls):
    assert said(format, text) == (content, calls)


def in_pieces(format: str, text: str, cuts: list[int]) -> Spoken:
    parser = ToolParser(TOOL_FORMATS[format](), NAMES)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = [piece for a, b in pairwise(places) for piece in parser.push(text[a:b])]
    found += parser.end()
    seen: set[int] = set()
    for piece in found:
        if isinstance(piece, CallPiece):
            assert (piece.name is not None) == (piece.index not in seen)  # the name comes once, and first
            assert (piece.id != "") == (piece.name is not None)
            seen.add(piece.index)
    assert seen == set(range(len(seen)))
    return Spoken.of(found)


def without_ids(spoken: Spoken) -> tuple[str, list[tuple[str, str]]]:
    return spoken.content, [(call.name, call.arguments) for call in spoken.calls]


@pytest.mark.parametrize(("format", "text"), [row[:2] for row in ANSWERS] + TEXTS)
def test_every_split_in_two_and_single_characters_say_the_same(format, text):
    whole = said(format, text)
    assert without_ids(in_pieces(format, text, list(range(len(text))))) == whole
    for cut in range(len(text)):
        assert without_ids(in_pieces(format, text, [cut])) == whole


MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<function=", "</function>")
FRAGMENTS = st.one_of(
    st.sampled_from([*MARKS, *"{}[]\"\\,:;()='\n f", "f(", '{"name": "f"', '"arguments": {']), st.text(max_size=3)
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.lists(FRAGMENTS | st.sampled_from([row[1] for row in ANSWERS]), max_size=12).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_no_text_is_too_odd_and_no_split_tells(format, text, cuts):
    assert without_ids(in_pieces(format, text, cuts)) == said(format, text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda values: st.one_of(
        st.lists(values, max_size=3), st.dictionaries(st.text("abc_", min_size=1, max_size=3), values, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text("abc_", min_size=1, max_size=3), JSON, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=5),
)
def test_what_a_format_writes_it_reads(format, calls, is_ascii, cuts):
    written = TOOL_FORMATS[format]().write(
        [ToolCall(name, json.dumps(arguments, ensure_ascii=is_ascii)) for name, arguments in calls]
    )
    spoken = in_pieces(format, written, cuts)
    assert spoken.content == ""
    assert [(call.name, json.loads(call.arguments)) for call in spoken.calls] == calls


def test_ids_are_of_the_formats_form_and_all_different():
    calls = parse_answer(TOOL_FORMATS["mistral"](), NAMES, f"[TOOL_CALLS][{', '.join([F] * 20)}]").calls
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    assert len({call.id for call in calls}) == 20
    [call] = parse_answer(TOOL_FORMATS["llama3"](), NAMES, F).calls
    assert call.id.startswith("call_")
    assert len(call.id) == 29


def test_control_tokens_mark_calls_where_they_stand():
    format = TOOL_FORMATS["llama3"]({"<|python_tag|>": 7})
    parser = ToolParser(format, NAMES, format.controls)
    pieces = [*parser.push("Well. ", 1), *parser.push("", 7), *parser.push(F, 2), *parser.end()]
    assert without_ids(Spoken.of(pieces)) == ("Well.", [("f", "{}")])


def test_what_only_looks_like_python_is_no_warning_of_the_server():
    code = """
from llama.chat.tools import TOOL_FORMATS, parse_answer
print(parse_answer(TOOL_FORMATS["pythonic"](), ["f"], "[f(a=1if 2else '\\d')]"))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "1if" in ran.stdout
    assert ran.stderr == ""
