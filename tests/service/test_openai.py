"""What bodies of OpenAI's API mean, without a file or a network around them."""

import base64

import numpy as np
import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.answer import Completion, Logprob
from llama.service import ENDPOINTS, Call
from llama.service.openai import text_offsets

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")


def respond(llm: Llama, url: str, body: dict) -> dict:
    call = Call.open(llm, ENDPOINTS[url], body)
    return call.respond(llm, list(llm.run(call.queries)))


@pytest.mark.parametrize(
    "fields",
    [
        dict(n=None, presence_penalty=None, frequency_penalty=None, stop=None, logit_bias=None, min_tokens=None),
        dict(user=None, metadata=None, logprobs=None, top_logprobs=None, something_new=None),
        dict(stream=False, stream_options=None),
        dict(response_format={"type": "text"}),
        dict(tools=[], tool_choice="none", parallel_tool_calls=True),
        dict(tools=None, tool_choice=None),
        dict(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "Ann"}]),
        dict(
            messages=[
                USER,
                {
                    "role": "assistant",
                    "content": "yo",
                    "refusal": None,
                    "tool_calls": None,
                    "annotations": [],
                },
                USER,
            ]
        ),
        dict(messages=[USER, {"role": "assistant", "content": None}, USER]),
        dict(messages=[USER, {"role": "assistant", "tool_calls": []}, USER]),
    ],
)
def test_what_says_nothing_is_taken_as_not_given(llm, fields):
    body = {"messages": [USER], "max_tokens": 2, "temperature": 0, **fields}
    [choice] = respond(llm, "/v1/chat/completions", body)["choices"]
    if "messages" not in fields:
        plain = {"messages": [USER], "max_tokens": 2, "temperature": 0}
        assert choice == respond(llm, "/v1/chat/completions", plain)["choices"][0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(stream=True), "stream: "),
        (dict(tools=[{"type": "function"}]), "tools holds what is no function"),
        (dict(response_format={"type": "sound"}), "response_format.type: "),
        (dict(messages=[USER, {"role": "assistant", "tool_calls": [{}]}]), "message 2 has a call that is none"),
        (dict(messages=[{**USER, "audio": {}}]), "messages.0.audio: "),
        (dict(messages=[{"role": "user", "content": None}]), "message 1 is not of the form"),
        (dict(something_new=1), "something_new: "),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused(llm, fields, message):
    with pytest.raises(ValueError, match=message):
        Call.open(llm, ENDPOINTS["/v1/chat/completions"], {"messages": [USER], **fields})


def test_max_completion_tokens_comes_before_max_tokens(llm):
    body = {"messages": [USER], "max_completion_tokens": 3, "max_tokens": 9, "ignore_eos": True}
    assert respond(llm, "/v1/chat/completions", body)["usage"]["completion_tokens"] == 3


def test_text_offsets_are_places_in_the_text():
    """Three bytes of one character, and a token behind the text that a stop string has cut off."""
    tokens = [*"a你b".encode(), 257, ord("c")]
    completion = Completion("a你b", tokens, "stop")
    assert text_offsets(completion, ByteTokenizer()) == [0, 1, 1, 1, 2, 3, 3]


def test_text_offsets_of_an_echoed_prompt_begin_with_the_prompt(llm):
    body = {"prompt": "héé", "echo": True, "logprobs": 1, "max_tokens": 4, "temperature": 0}
    [choice] = respond(llm, "/v1/completions", body)["choices"]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[:6] == [0, 0, 1, 1, 2, 2]  # BOS has no text
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(choice["text"])


def test_ids_of_a_padded_table_have_no_text(llm):
    """A model's table may have more rows than the tokenizer has tokens, and such a row may be among the likeliest."""
    call = Call.open(llm, ENDPOINTS["/v1/completions"], {"prompt": "x", "logprobs": 1})
    token = llm.tokenizer.n_words + 3
    completion = Completion("", [token], "length", logprobs=[Logprob(token, -1.0, ((token, -1.0),))])
    logprobs = call.respond(llm, [completion])["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [""]
    assert logprobs["top_logprobs"] == [{"": -1.0}]


def test_embeddings_in_base64_are_the_same_numbers(llm):
    """OpenAI's own client asks for base64 where its caller asks for nothing."""
    plain = respond(llm, "/v1/embeddings", {"input": ["a", "b"]})["data"]
    coded = respond(llm, "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"})["data"]
    for number, text in zip(plain, coded, strict=True):
        assert np.frombuffer(base64.b64decode(text["embedding"]), "<f4").tolist() == number["embedding"]


def test_a_completion_that_failed_is_no_answer(llm):
    call = Call.open(llm, ENDPOINTS["/v1/completions"], {"prompt": "x"})
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        call.respond(llm, [Completion("", [], "error", error="out of luck")])


def test_a_completion_tells_the_ids_and_bytes_of_its_tokens_and_of_the_likeliest(llm):
    body = {"prompt": [256, 104, 105], "logprobs": 2, "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    [choice] = respond(llm, "/v1/completions", body)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["id"] for entry in content] == choice["token_ids"]
    assert all(entry["id"] == entry["top_logprobs"][0]["id"] for entry in content)  # greedy
    assert [entry["bytes"] for entry in content] == [list(llm.tokenizer.token_bytes(id)) for id in choice["token_ids"]]
    echoed = respond(llm, "/v1/completions", {**body, "max_tokens": 0, "echo": True})["choices"][0]
    assert [entry and entry["id"] for entry in echoed["logprobs"]["content"]] == [None, 104, 105]
    assert "token_ids" not in respond(llm, "/v1/completions", {**body, "return_token_ids": False})["choices"][0]


def test_a_prompt_is_shown_as_its_chat_format_writes_it(llm):
    assert respond(llm, "/apply-template", {"messages": [USER]}) == {"prompt": "<s>[INST] hi [/INST]"}


def test_a_program_can_check_a_body_without_a_model():
    from llama.protocol import ChatRequest, Refusal, parse

    parts = [{"type": "text", "text": "hi"}]
    assert parse(ChatRequest, {"messages": [{"role": "user", "content": parts}]}).messages[0].content == parts
    with pytest.raises(Refusal) as refused:
        parse(ChatRequest, {"messages": [USER], "something_new": 1})
    assert refused.value.param == "something_new"
