"""What the server suites of llama.cpp and vLLM demand of any server of this API, in our own words."""

import json

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DIALOG = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
ASKED = {"model": "m", "messages": DIALOG, "max_tokens": 8, "temperature": 0}
PROMPT = {"model": "m", "prompt": "once", "max_tokens": 8, "temperature": 0}


def chunks(running, url: str, body: dict) -> list[dict]:
    with running.open("POST", url, {**body, "stream": True}) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *frames, done, rest = response.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


# ---- llama.cpp's


@pytest.mark.parametrize(
    "messages",
    [None, "string", [123], [{}], [{"role": 123}], [{"role": "user", "content": 123}], [{"content": "x"}], []],
)
def test_messages_that_are_none_are_refused(running, messages):
    status, answer = running.post(CHAT, {**ASKED, "messages": messages})
    assert 400 <= status < 500
    assert answer["error"]["message"]


def test_parts_of_a_text_are_the_text(running):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    whole = [{"role": "user", "content": "one\ntwo"}]
    answers = [
        running.post(CHAT, {**ASKED, "messages": messages})[1]["choices"][0]["message"]["content"]
        for messages in ([{"role": "user", "content": parts}], whole)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["sound", 7, None, {"type": "sound"}])
def test_a_response_format_that_is_none_is_refused(running, kind):
    status, answer = running.post(CHAT, {**ASKED, "response_format": {"type": kind}})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_logprobs_come_with_bytes_and_alternatives(running):
    asked = {**ASKED, "logprobs": True, "top_logprobs": 5}
    streamed = [
        entry
        for chunk in chunks(running, CHAT, asked)
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    [choice] = running.post(CHAT, asked)[1]["choices"]
    assert [e["token"] for e in streamed] == [e["token"] for e in choice["logprobs"]["content"]]
    for entry in streamed:
        assert entry["bytes"]
        assert len(entry["top_logprobs"]) == 5
        assert entry["logprob"] <= 0


def test_a_bias_takes_tokens_out(running):
    first = running.post(TEXT, {**PROMPT, "max_tokens": 1, "logprobs": 0})[1]["choices"][0]["logprobs"]
    tokens = running.post("/tokenize", {"prompt": first["tokens"][0], "add_special_tokens": False})[1]["tokens"]
    if len(tokens) == 1:  # a byte that is no text by itself cannot be asked for
        biased = running.post(TEXT, {**PROMPT, "max_tokens": 1, "logit_bias": {str(tokens[0]): -100}})[1]
        assert biased["choices"][0]["text"] != first["tokens"][0]


def test_token_ids_are_the_text_that_they_stand_for(running):
    tokens = running.post("/tokenize", {"prompt": "once"})[1]["tokens"]
    texts = [
        choice["text"]
        for prompt in ("once", tokens, ["once", "upon"], [tokens, tokens])
        for choice in running.post(TEXT, {**PROMPT, "prompt": prompt})[1]["choices"]
    ]
    assert len(texts) == 6
    assert len({*texts[:3], *texts[4:]}) == 1


def test_the_same_seed_gives_the_same_text_and_another_another(running):
    def text(seed: int) -> str:
        asked = {**PROMPT, "temperature": 1.0, "seed": seed, "max_tokens": 16}
        return running.post(TEXT, asked)[1]["choices"][0]["text"]

    assert text(1) == text(1) != text(2)


def test_a_prompt_that_is_longer_than_the_context_is_refused(running):
    status, answer = running.post(CHAT, {**ASKED, "messages": [{"role": "user", "content": "x" * 1000}]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


# ---- vLLM's


@pytest.mark.parametrize(("logprobs", "least", "most"), [(0, 1, 1), (5, 5, 6)])
def test_as_many_alternatives_come_as_were_asked_for(running, logprobs, least, most):
    [choice] = running.post(TEXT, {**PROMPT, "logprobs": logprobs})[1]["choices"]
    assert least <= len(choice["logprobs"]["top_logprobs"][0]) <= most


def test_too_many_alternatives_are_refused_and_the_server_lives(running):
    assert running.post(TEXT, {**PROMPT, "logprobs": 21})[0] == 400
    assert running.post(CHAT, {**ASKED, "logprobs": True, "top_logprobs": 21})[0] == 400
    assert running.post(TEXT, PROMPT)[0] == 200


@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_each_choice_of_a_stream_ends_once(running, url):
    asked = {**(ASKED if url == CHAT else PROMPT), "n": 3, "temperature": 1.0, "seed": 3}
    found = chunks(running, url, asked)
    ends = [choice["index"] for chunk in found for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    choices = running.post(url, asked)[1]["choices"]
    assert len({choice["text"] if url == TEXT else choice["message"]["content"] for choice in choices}) == 3


def test_the_last_chunk_of_a_text_that_is_cut_has_text(running):
    *_, last = chunks(running, TEXT, {**PROMPT, "ignore_eos": True, "stop": None})
    assert last["choices"][0]["finish_reason"] == "length"
    joined = "".join(chunk["choices"][0]["text"] for chunk in chunks(running, TEXT, {**PROMPT, "ignore_eos": True}))
    assert joined == running.post(TEXT, {**PROMPT, "ignore_eos": True})[1]["choices"][0]["text"]


@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_usage_of_a_stream_is_as_asked(running, url):
    asked = ASKED if url == CHAT else PROMPT
    *found, last = chunks(running, url, {**asked, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in found)
    assert (last["choices"], last["usage"]["completion_tokens"] > 0) == ([], True)
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert all(chunk["usage"] for chunk in chunks(running, url, {**asked, "stream_options": options}))
    without = {**asked, "stream_options": {"include_usage": False}}
    assert all("usage" not in chunk for chunk in chunks(running, url, without))
    assert running.post(url, {**asked, "stream_options": {"include_usage": True}})[0] == 400


@pytest.mark.parametrize("prompt", [[], "", [[]], [""], None])
def test_a_prompt_of_nothing_is_answered_or_refused(running, prompt):
    """An empty text is BOS alone, where the tokenizer has one; an empty list is nothing."""
    status, _ = running.post(TEXT, {**PROMPT, "prompt": prompt})
    assert status == (200 if prompt in ("", [""]) else 400)


def test_a_bias_beyond_the_vocabulary_is_refused(running):
    status, answer = running.post(TEXT, {**PROMPT, "logit_bias": {"264": 1}})
    assert (status, answer["error"]["param"]) == (400, "logit_bias")


@pytest.mark.parametrize("body", [b"7", b"[]", b'"text"', b"null", b"", b"{", b'{"model": "m"'])
@pytest.mark.parametrize("url", [CHAT, TEXT, "/v1/embeddings", "/tokenize"])
def test_a_body_that_is_no_object_is_refused(running, url, body):
    status, answer = running.post(url, body)
    assert status == 400
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_a_model_must_be_named(running):
    for url, asked in ((CHAT, ASKED), (TEXT, PROMPT)):
        status, answer = running.post(url, {key: value for key, value in asked.items() if key != "model"})
        assert (status, answer["error"]["param"]) == (400, "model")


def test_tool_choice_without_tools_says_nothing(running):
    assert running.post(CHAT, {**ASKED, "tools": None, "tool_choice": None})[0] == 200
    assert running.post(CHAT, {**ASKED, "tools": [], "tool_choice": "none"})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_as_many_tokens_as_there_is_room_for(running, stream):
    """-1 is llama.cpp's way to say so; 0 is no answer."""
    asked = {**ASKED, "ignore_eos": True}
    status, answer = running.post(CHAT, {**asked, "max_tokens": -1})
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")
    assert answer["usage"]["total_tokens"] == 256
    assert running.post(CHAT, {**asked, "max_tokens": 0})[0] == 400


LOOKED_UP = ["/health", "/v1/models", "/props", "/slots", "/tokenizer_info", "/version", "/metrics"]


@pytest.mark.parametrize("path", LOOKED_UP)
def test_what_tools_look_up_is_there(running, path):
    assert running.get(path)[0] == 200


def test_what_tools_look_for_in_it_is_there(running):
    [model] = running.get("/v1/models")[1]["data"]
    assert model["max_model_len"] == running.get("/props")[1]["default_generation_settings"]["n_ctx"] == 256
    assert running.get("/props")[1]["chat_formats"] == ["llama2", "atom", "alpaca", "vicuna"]
    assert model["meta"]["n_vocab"] == 264
    assert running.get("/tokenizer_info")[1]["eos_token"] == "</s>"
    assert running.get(f"/v1/models/{model['id']}")[1] == model
    assert running.get("/v1//models")[0] == 200  # Open WebUI's, where its address ends with a slash


def test_text_to_ids_and_back(running):
    tokens = running.post("/tokenize", {"prompt": "née", "add_special_tokens": True})[1]["tokens"]
    assert tokens == [256, *"née".encode()]
    assert running.post("/tokenize", {"content": "née", "add_special": False})[1]["tokens"] == tokens[1:]
    assert running.post("/detokenize", {"tokens": tokens})[1]["prompt"] == "née"
    assert running.post("/detokenize", {"tokens": [264]})[0] == 400
    chat = running.post("/tokenize", {"messages": DIALOG})[1]["tokens"]
    assert chat == running.server.llm.chat_format.encode(DIALOG)
