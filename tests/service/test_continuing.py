"""Chats whose answer goes on from the last message, as vLLM's clients ask for it."""

import math
from dataclasses import replace

import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama, SamplingParams
from llama.chat import Prompt
from llama.service import ENDPOINTS, Call, Refusal

BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, "}]
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")


def test_an_answer_goes_on_from_the_last_message_and_is_what_is_new(llm):
    body = {"messages": BEGUN, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    call = Call.open(llm, ENDPOINTS["/v1/chat/completions"], {**body, **CONTINUE})
    [query] = call.queries
    assert llm.tokenizer.decode(query.tokens) == "[INST] hi [/INST] well, "
    [choice] = call.respond(llm, list(llm.run(call.queries)))["choices"]
    [expected] = llm.complete([query.tokens], query.params)
    assert choice["message"]["content"] == expected.text


def test_the_library_continues_a_prompt(llm):
    """Where every token is a letter, greedy decoding goes on with the very same ones."""
    only_ascii = dict.fromkeys(range(128, 264), -math.inf)
    params = SamplingParams(temperature=0, max_tokens=8, logit_bias=only_ascii)
    [whole] = llm.chat([Prompt(BEGUN, continues=True)], params)
    begun = Prompt([BEGUN[0], {"role": "assistant", "content": f"well, {whole.text[:3]}"}], continues=True)
    [rest] = llm.chat([begun], replace(params, max_tokens=5))
    assert whole.text[3:] == rest.text == "".join(llm.stream_chat(begun, replace(params, max_tokens=5)))


def test_tokenize_shows_what_an_answer_goes_on_from(llm):
    def tokens(**fields: object) -> list[int]:
        call = Call.open(llm, ENDPOINTS["/tokenize"], {"messages": BEGUN, **fields})
        return call.respond(llm, [])["tokens"]

    assert llm.tokenizer.decode(tokens(**CONTINUE)).endswith("[/INST] well, ")
    with pytest.raises(Refusal, match=r"^Last message must be from user") as error:
        tokens()
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "both true: give one of them",
            "continue_final_message",
        ),
        ({"add_generation_prompt": False}, "served with continue_final_message", "add_generation_prompt"),
        ({**CONTINUE, "messages": BEGUN[:1]}, "the last message has role 'user', not 'assistant'", "messages"),
    ],
)
def test_what_cannot_be_continued_is_refused(llm, fields, message, param):
    for url in ("/v1/chat/completions", "/tokenize"):
        with pytest.raises(Refusal, match=message) as error:
            Call.open(llm, ENDPOINTS[url], {"messages": BEGUN, **fields}).respond(llm, [])
        assert error.value.param == param
