"""The tutorials' POST /generate."""

import re

import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model
from support.tutorial import CLIENT_FIELDS

from llama import Llama
from llama.service import ENDPOINTS, Call, Refusal
from llama.service.tutorial import total_logprob

HISTORY = [{"role": "Human", "content": "你好"}]
GREEDY = {"temperature": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="atom")


def opened(llm: Llama, **fields: object) -> Call:
    return Call.open(llm, ENDPOINTS["/generate"], {"history": HISTORY, **fields})


def respond(llm: Llama, **fields: object) -> dict:
    call = opened(llm, **fields)
    return call.respond(llm, list(llm.run(call.queries)))


def prompt(llm: Llama, **fields: object) -> str:
    return llm.tokenizer.decode(opened(llm, **fields).queries[0].tokens)


def test_the_answer_has_the_three_keys_that_the_client_reads(llm):
    answer = respond(llm, **GREEDY)
    assert list(answer) == ["response", "status", "time"]
    assert answer["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer["time"])
    [query] = opened(llm, **GREEDY).queries
    [expected] = llm.complete([query.tokens], query.params)
    assert answer["response"] == expected.text


@pytest.mark.parametrize("assistant", ["Assistant", "Assitant"])
def test_roles_are_the_clients_own_with_its_slip(llm, assistant):
    history = [*HISTORY, {"role": assistant, "content": "好"}, {"role": "Human", "content": "再见"}]
    text = prompt(llm, history=history, system_prompt="简短")
    assert text == "System: 简短\nHuman: 你好\nAssistant: 好\nHuman: 再见\nAssistant: "
    assert prompt(llm, system_prompt="") == "Human: 你好\nAssistant: "


def test_all_fields_of_the_client_count(llm):
    params = opened(llm, **CLIENT_FIELDS).queries[0].params
    assert (params.n, params.presence_penalty, params.frequency_penalty) == (1, 1.2, 0.2)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.3, 0.95, 50, 2048)
    assert (params.stop, params.logprobs) == (("Human:",), None)
    assert opened(llm, stop=["x"], ignore_eos=True).queries[0].params.stop == ("x",)


def test_of_several_answers_the_likeliest_is_given(llm):
    asked = {"best_of": 4, "temperature": 1.0, "seed": 3, "max_new_tokens": 6, "ignore_eos": True}
    call = opened(llm, **asked)
    completions = list(llm.run(call.queries))
    best = max(completions, key=total_logprob)
    assert call.respond(llm, completions)["response"] == best.text
    several = respond(llm, **asked, n=2)
    assert several["responses"][0] == several["response"] == best.text
    assert len(several["responses"]) == 2


def test_logprobs_come_where_they_are_asked_for(llm):
    logprobs = respond(llm, **GREEDY, ignore_eos=True, logprobs=1)["logprobs"]
    assert len(logprobs["token_logprobs"]) == 8
    assert "logprobs" not in respond(llm, **GREEDY, best_of=2)


def test_the_oldest_turns_leave_a_history_that_is_too_long(llm):
    turns = [{"role": ("Human", "Assistant")[i % 2], "content": f"{i:020}"} for i in range(21)]
    text = prompt(llm, history=turns, system_prompt="s", **GREEDY)
    assert text.startswith("System: s\nHuman: ")
    assert text.endswith(f"Human: {20:020}\nAssistant: ")
    assert 200 < len(opened(llm, history=turns, **GREEDY).queries[0].tokens) <= 248
    alone = [{"role": "Human", "content": "x" * 200}]  # which leaves less room than was asked for
    assert len(prompt(llm, history=alone, max_new_tokens=100)) > 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(use_beam_search=True), "^use_beam_search is true: answers are sampled here"),
        (dict(n=2, best_of=1), "^best_of is 1: draw at least n"),
        (dict(history=[{"role": "user", "content": "x"}]), "^history.0.role: .*'Human', 'Assistant'"),
        (dict(history=[]), "^the dialog is empty"),
        (dict(history=[{"role": "Human", "content": "x" * 300}]), "^the last message takes 3"),
        (dict(max_new_tokens=0), "^max_new_tokens: "),
        (dict(something_new=1), "^something_new: "),
    ],
)
def test_what_cannot_be_answered_is_told_with_its_status(llm, fields, message):
    with pytest.raises(Refusal, match=message) as error:
        opened(llm, **fields)
    body = ENDPOINTS["/generate"].error_json(error.value)
    assert (body["error"], body["status"]) == (str(error.value), 400)
