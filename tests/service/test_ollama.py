"""Ollama's wire: what its bodies mean, and that the lines of a stream say what the answer in one piece does."""

import json
from datetime import datetime

import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.answer import Completion, Event
from llama.service import OLLAMA_ENDPOINTS, Call, Refusal, failure
from llama.service.ollama_model import in_words, ollama_running, ollama_tags

CHAT, GENERATE = "/api/chat", "/api/generate"
USER = {"role": "user", "content": "hi"}
GREEDY = {"temperature": 0, "num_predict": 8}
ASKED = {CHAT: {"messages": [USER], "options": GREEDY}, GENERATE: {"prompt": "hi", "options": GREEDY}}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")


def opened(llm: Llama, url: str, **fields: object) -> Call:
    return Call.open(llm, OLLAMA_ENDPOINTS[url], {"model": "m", **ASKED.get(url, {}), **fields}, can_stream=True)


def respond(llm: Llama, url: str, **fields: object) -> dict:
    call = opened(llm, url, stream=False, **fields)
    return call.respond(llm, list(llm.run(call.queries)))


def lines(llm: Llama, url: str, **fields: object) -> list[dict]:
    call = opened(llm, url, **fields)
    frames = call.frames(llm)
    text = "".join(map(frames.push, llm.engine.run(call.queries))) + frames.end()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def said(line: dict) -> str:
    return line["response"] if "response" in line else line["message"]["content"]


def prompt(llm: Llama, url: str, **fields: object) -> str:
    [query] = opened(llm, url, **fields).queries
    return llm.tokenizer.decode(query.tokens)


@pytest.mark.parametrize("url", [CHAT, GENERATE])
def test_answers_are_streamed_unless_told_otherwise_and_say_the_same(llm, url):
    *pieces, last = lines(llm, url)
    whole = respond(llm, url)
    assert "".join(map(said, pieces)) == said(whole) != ""
    assert not any(piece["done"] for piece in pieces)
    assert said(last) == ""
    for done in (last, whole):
        assert (done["done"], done["done_reason"], done["model"]) == (True, "length", "m")
        assert (done["prompt_eval_count"], done["eval_count"]) == (len(opened(llm, url).queries[0].tokens), 8)
        assert done["total_duration"] >= done["eval_duration"] > 0
        assert datetime.fromisoformat(done["created_at"])
    assert last["prompt_eval_duration"] + last["eval_duration"] == last["total_duration"]


def test_both_ask_the_same_model_the_same(llm):
    assert prompt(llm, CHAT) == prompt(llm, GENERATE) == "[INST] hi [/INST]"
    system = [{"role": "system", "content": "Be kind."}, USER]
    assert prompt(llm, CHAT, messages=system) == prompt(llm, GENERATE, system="Be kind.")
    assert prompt(llm, GENERATE, raw=True) == "hi"
    begun = [USER, {"role": "assistant", "content": "Well, "}]
    assert prompt(llm, CHAT, messages=begun) == "[INST] hi [/INST] Well, "


def test_options_are_sampling_parameters(llm):
    options = {
        **{"seed": 3, "top_k": 40, "top_p": 0.5, "min_p": 0.1, "temperature": 1, "num_predict": -1, "stop": ["x"]},
        **{"repeat_penalty": 1.1, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        **{"num_ctx": 4096, "num_gpu": 99, "mirostat": 0, "tfs_z": 1, "typical_p": 1.0, "repeat_last_n": 64},
    }
    [query] = opened(llm, GENERATE, raw=True, options=options).queries
    params = query.params
    assert (params.seed, params.top_k, params.top_p, params.min_p, params.temperature) == (3, 40, 0.5, 0.1, 1.0)
    assert (params.max_tokens, params.stop) == (None, ("x",))
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 1.0, 0.5)


@pytest.mark.parametrize(("url", "nothing"), [(CHAT, {"messages": []}), (GENERATE, {"prompt": ""})])
def test_who_asks_nothing_is_told_that_the_model_is_loaded(llm, url, nothing):
    [line] = lines(llm, url, **nothing)
    assert (line["done"], line["done_reason"], said(line)) == (True, "load", "")
    assert respond(llm, url, **nothing).keys() == line.keys()


def test_logprobs_come_with_their_pieces(llm):
    asked = {"logprobs": True, "top_logprobs": 2}
    *pieces, _ = lines(llm, CHAT, **asked)
    entries = [entry for piece in pieces for entry in piece.get("logprobs", [])]
    assert entries == respond(llm, CHAT, **asked)["logprobs"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 8


def test_thinking_is_told_to_the_template(llm):
    assert opened(llm, CHAT, think=False).body.template_options() == {"enable_thinking": False}
    assert opened(llm, CHAT, think="high").body.template_options() == {"enable_thinking": True}
    assert opened(llm, CHAT).body.template_options() == {}


def test_texts_become_vectors(llm):
    answer = respond_embed(llm, input=["one", "two"])
    assert answer["embeddings"] == [pytest.approx(row.tolist(), abs=1e-6) for row in llm.embed(["one", "two"])]
    assert answer["prompt_eval_count"] == 8
    assert respond_embed(llm, input="one")["embeddings"] == [pytest.approx(answer["embeddings"][0], abs=1e-6)]
    assert respond_embed(llm, input=[])["embeddings"] == []
    assert len(respond_embed(llm, input="x" * 300)["embeddings"]) == 1  # cut to the context
    with pytest.raises(Refusal, match="the prompt has 301 tokens"):
        respond_embed(llm, input="x" * 300, truncate=False)


def respond_embed(llm: Llama, **fields: object) -> dict:
    call = Call.open(llm, OLLAMA_ENDPOINTS["/api/embed"], {"model": "m", **fields})
    return call.respond(llm, list(llm.run(call.queries)))


def test_a_model_is_shown_as_editors_look_for_it(llm):
    for body in ({"model": "m"}, {"name": "m"}):
        shown = Call.open(llm, OLLAMA_ENDPOINTS["/api/show"], body).respond(llm, [])
        info = shown["model_info"]
        assert info[f"{info['general.architecture']}.context_length"] == llm.max_seq_len
        assert shown["capabilities"] == ["completion", "tools", "embedding"]
    with pytest.raises(Refusal, match=r"^model: give the model's name$"):
        Call.open(llm, OLLAMA_ENDPOINTS["/api/show"], {}).respond(llm, [])


def test_models_are_listed_with_their_size(llm):
    [model] = ollama_tags(llm, "m")["models"]
    assert (model["name"], model["model"]) == ("m", "m")
    assert model["size"] == sum(p.numel() * 4 for p in [*llm.model.parameters(), *llm.model.buffers()])
    assert len(model["digest"]) == 64
    assert datetime.fromisoformat(model["modified_at"])
    [running] = ollama_running(llm, "m")["models"]
    assert (running["context_length"], running["size_vram"]) == (llm.max_seq_len, 0)


def test_a_number_of_parameters_is_told_in_words():
    assert [in_words(count) for count in (134_515_008, 6_738_415_616, 300_000)] == ["135M", "6.7B", "300K"]


@pytest.mark.parametrize(
    ("url", "fields", "message"),
    [
        (CHAT, dict(tools=[{"type": "function"}]), "tools holds what is no function"),
        (CHAT, dict(messages=[{**USER, "images": ["aGk="]}]), "messages.0.images: .*not served"),
        (CHAT, dict(format="xml"), "format.*: .*json"),
        (GENERATE, dict(suffix="x"), "suffix: "),
        (GENERATE, dict(context=[1, 2]), "context: "),
        (GENERATE, dict(options={"mirostat": 2}), "options.mirostat: this is not served: give 0"),
        (GENERATE, dict(options={"temperature": -1, "top_p": 3}), "top_p must be"),
        (GENERATE, dict(options={"something_new": 2}), "options.something_new: "),
        (GENERATE, dict(prompt="x" * 300), "the prompt has "),
    ],
)
def test_what_is_not_served_is_refused_in_ollamas_form(llm, url, fields, message):
    with pytest.raises(Refusal, match=message) as error:
        opened(llm, url, **fields)
    assert OLLAMA_ENDPOINTS[url].error_json(error.value) == {"error": str(error.value)}


def test_what_says_nothing_is_taken_as_not_given(llm):
    for url, fields in ((CHAT, dict(tools=[], format="", keep_alive="5m")), (GENERATE, dict(suffix="", context=[]))):
        assert said(respond(llm, url, **fields)) == said(respond(llm, url))


def test_an_error_in_the_midst_is_a_line(llm):
    frames = opened(llm, CHAT).frames(llm)
    assert json.loads(frames.fail(failure("out of luck"))) == {"error": "out of luck"}
    assert frames.ping == ""


def test_calls_of_tools_come_whole_with_arguments_as_objects():
    """Text is streamed; all calls stand in one line in front of the last one."""
    llm = Llama(tiny_model(tiny_args(max_seq_len=1024)), ByteTokenizer(), chat_format="llama2")
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    body = {"model": "m", "messages": [USER], "tools": [{"type": "function", "function": function}]}
    call = Call.open(llm, OLLAMA_ENDPOINTS[CHAT], body, can_stream=True)
    text = 'Well. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    parts = [Event(0, 0, 1, piece) for piece in text] + [Event(0, 0, completion=Completion(text, [], "stop"))]
    frames = call.frames(llm)
    *said, calls, last = [json.loads(one) for one in "".join(frames.push([p]) for p in parts).splitlines()]
    assert "".join(one["message"]["content"] for one in said).strip() == "Well."
    assert calls["message"]["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    assert last["done"]
    whole = call.respond(llm, [Completion(text, [1], "stop")])
    assert whole["message"]["tool_calls"] == calls["message"]["tool_calls"]


def test_calls_and_their_results_are_told_to_the_model(llm):
    asked = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    dialog = [USER, {"role": "assistant", "content": "", "tool_calls": [asked]}]
    dialog.append({"role": "tool", "tool_name": "weather", "content": "rain"})
    plain = Call.open(llm, OLLAMA_ENDPOINTS[CHAT], {"model": "m", "messages": [USER]}, can_stream=True)
    whole = Call.open(llm, OLLAMA_ENDPOINTS[CHAT], {"model": "m", "messages": dialog}, can_stream=True)
    told = llm.tokenizer.decode(list(whole.queries[0].tokens))
    assert "weather" in told
    assert "rain" in told
    assert len(whole.queries[0].tokens) > len(plain.queries[0].tokens)
