"""Every client's way to say what an answer has to look like comes to one of three fields."""

import json
import re

import jsonschema
import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.service import ENDPOINTS, OLLAMA_ENDPOINTS, Call, Refusal

ENUM = {"enum": [[1], {"k": "v"}]}
UNSUPPORTED = {**ENUM, "not": {"type": "null"}}
NAMED = {"name": "thing", "description": "of some kind"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
PROMPTS = {CHAT: {"messages": USER}, TEXT: {"prompt": "hi"}}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=8)), ByteTokenizer(), chat_format="llama2")


def answer(llm: Llama, url: str, **asked: object) -> str:
    body = {"max_tokens": 120, "temperature": 1.5, "seed": 4, **PROMPTS[url], **asked}
    call = Call.open(llm, ENDPOINTS[url], body)
    [choice] = call.respond(llm, list(llm.run(call.queries)))["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if url == CHAT else choice["text"]


def refusal(llm: Llama, endpoint: object, body: dict) -> Refusal:
    with pytest.raises(Refusal) as refused:
        Call.open(llm, endpoint, body, can_stream=True)
    return refused.value


@pytest.mark.parametrize("url", PROMPTS)
@pytest.mark.parametrize(
    "asked",
    [
        dict(response_format={"type": "json_schema", "json_schema": {**NAMED, "schema": ENUM, "strict": True}}),
        dict(response_format={"type": "json_schema", "json_schema": {**NAMED, "schema": UNSUPPORTED}}),
        dict(response_format={"type": "json_object", "schema": ENUM}),
        dict(json_schema=ENUM),
        dict(json_schema=json.dumps(ENUM)),
        dict(guided_json=ENUM),
        dict(guided_json=json.dumps(ENUM), guided_regex=None),
        dict(structured_outputs={"json": ENUM}),
    ],
)
def test_every_spelling_of_a_schema_is_kept(llm, url, asked):
    jsonschema.validate(json.loads(answer(llm, url, **asked)), ENUM)


@pytest.mark.parametrize("url", PROMPTS)
@pytest.mark.parametrize(
    "asked",
    [
        dict(regex="a[bc]{2}"),
        dict(guided_regex="a[bc]{2}"),
        dict(structured_outputs={"regex": "a[bc]{2}"}),
        dict(grammar='root ::= "a" [bc] [bc]'),
        dict(guided_grammar='start: "a" /[bc]/ /[bc]/'),
        dict(structured_outputs={"grammar": 'root ::= "a" [bc] [bc]'}),
        dict(guided_choice=["abc", "acb"]),
        dict(structured_outputs={"choice": ["abb"]}),
    ],
)
def test_every_spelling_of_an_expression_a_grammar_or_a_choice_is_kept(llm, url, asked):
    assert re.fullmatch("a[bc]{2}", answer(llm, url, **asked))


@pytest.mark.parametrize(
    "asked", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_object_is_an_object(llm, asked):
    assert answer(llm, CHAT, **asked, logit_bias={str(ord("}")): 15}).strip().startswith("{")


def test_options_may_hold_any_character(llm):
    options = ['say "no"', "back\\slash", "naïve 😀", "two\nlines"]
    found = {answer(llm, CHAT, guided_choice=options, seed=seed) for seed in range(12)}
    assert len(found) > 1
    assert found <= set(options)


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        (dict(response_format={"type": "json_schema", "json_schema": {**NAMED, "schema": UNSUPPORTED, "strict": True}}),
         "response_format", "not is not supported"),
        (dict(response_format={"type": "json_schema", "json_schema": NAMED}), "response_format", "give the schema"),
        (dict(response_format={"type": "json_schema"}), "response_format", "give the schema"),
        (dict(guided_json=UNSUPPORTED), "guided_json", "not is not supported"),
        (dict(guided_json="nonsense"), "guided_json", "must be a JSON schema"),
        (dict(guided_regex="(?=a)b"), "guided_regex", "look-around"),
        (dict(guided_choice=[]), "guided_choice", "at least 1 item"),
        (dict(guided_grammar="start: nowhere"), "guided_grammar", "unknown name"),
        (dict(structured_outputs={"grammar": "start: nowhere"}), "structured_outputs", "unknown name"),
        (dict(json_schema=UNSUPPORTED), "json_schema", "not is not supported"),
        (dict(structured_outputs={"json": UNSUPPORTED}), "structured_outputs", "not is not supported"),
        (dict(response_format={"type": "json_object", "schema": UNSUPPORTED}),
         "response_format", "not is not supported"),
        (dict(regex="a", guided_json={}), "guided_json", "guided_json is given beside regex"),
        (dict(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
         "structured_outputs", "beside response_format"),
        (dict(response_format={"type": "grammar"}), "response_format.type", "response_format.type"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_under_the_clients_own_word(llm, asked, param, said):
    found = refusal(llm, ENDPOINTS[CHAT], {"messages": USER, **asked})
    assert found.param == param
    assert said in str(found)


def test_unknown_fields_that_are_ignored_leave_the_schema_where_it_is(llm):
    named = {"type": "json_schema", "json_schema": {**NAMED, "schema": ENUM, "unknown": 1}}
    body = {"messages": USER, "response_format": named, "unknown": 2}
    call = Call.open(llm, ENDPOINTS[CHAT], body, ignore_unknown=True)
    assert "k" in call.queries[0].params.json_schema


@pytest.mark.parametrize("format", ["json", ENUM])
def test_ollamas_format_is_json_or_a_schema(llm, format):
    body = {
        "model": "m",
        "messages": USER,
        "stream": False,
        "format": format,
        "options": {"num_predict": 90, "seed": 1},
    }
    call = Call.open(llm, OLLAMA_ENDPOINTS["/api/chat"], body)
    text = call.respond(llm, list(llm.run(call.queries)))["message"]["content"]
    assert text.startswith("{" if format == "json" else ("{", "["))
    assert Call.open(llm, OLLAMA_ENDPOINTS["/api/chat"], {**body, "format": ""}).queries[0].params.shape is None
    assert refusal(llm, OLLAMA_ENDPOINTS["/api/chat"], {**body, "format": UNSUPPORTED}).param == "format"


def test_anthropics_output_format_is_a_schema(llm):
    body = {
        "model": "m",
        "max_tokens": 90,
        "messages": USER,
        "output_config": {"format": {"type": "json_schema", "schema": ENUM}},
    }
    call = Call.open(llm, ENDPOINTS["/v1/messages"], body)
    [block] = call.respond(llm, list(llm.run(call.queries)))["content"]
    jsonschema.validate(json.loads(block["text"]), ENUM)
    body["output_config"]["format"]["schema"] = UNSUPPORTED
    assert refusal(llm, ENDPOINTS["/v1/messages"], body).param == "output_config"
