"""OpenAI's own package, with nothing changed but its base URL."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from support.loops import run_async
from support.server import Running

from llama import SamplingParams

DIALOG = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_looked_up(client):
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_an_answer_is_that_of_the_library(client, running):
    answer = client.chat.completions.create(model="m", messages=DIALOG, temperature=0, max_tokens=8)
    [expected] = running.server.llm.chat([DIALOG], SamplingParams(temperature=0.0, max_tokens=8))
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.tokens)


def test_a_stream_says_the_same(client):
    asked = dict(model="m", messages=DIALOG, seed=7, temperature=1.0, max_tokens=20, n=3)
    whole = client.chat.completions.create(**asked)
    texts = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) == 3


def test_32_calls_at_once_get_their_own_answers(client):
    def ask(seed: int) -> str:
        asked = dict(model="m", prompt="go", seed=seed, temperature=1.0, max_tokens=12)
        streamed = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))
        return streamed, client.completions.create(**asked).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert all(streamed == whole for streamed, whole in answers)
    assert len({whole for _, whole in answers}) > 16


def test_100_streams_at_once_are_whole_and_in_order(running):
    async def ask(client: openai.AsyncOpenAI, seed: int) -> tuple[str, list[str]]:
        asked = dict(model="m", prompt="go", seed=seed, temperature=1.0, max_tokens=10, extra_body={"ignore_eos": True})
        found = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
        return "".join(choice.text for choice in found), [c.finish_reason for c in found if c.finish_reason]

    async def ask_all() -> list[tuple[str, list[str]]]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(100)))

    params = [SamplingParams(seed=seed, temperature=1.0, max_tokens=10, ignore_eos=True) for seed in range(100)]
    expected = running.server.llm.complete(["go"] * 100, params)
    assert run_async(ask_all()) == [(answer.text, ["length"]) for answer in expected]


def test_logprobs_are_those_of_score(client, running):
    prompt = [256, *b"some text"]
    answer = client.completions.create(model="m", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)
    [expected] = running.server.llm.score([prompt])
    found = answer.choices[0].logprobs.token_logprobs[: len(prompt)]
    assert found[0] is None
    assert all(math.isclose(a, b.logprob, abs_tol=1e-5) for a, b in zip(found[1:], expected[1:], strict=True))


def test_chat_logprobs_join_to_the_content(client):
    answer = client.chat.completions.create(
        model="m", messages=DIALOG, logprobs=True, top_logprobs=3, max_tokens=6, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == answer.choices[0].message.content
    )
    assert all(len(entry.top_logprobs) == 3 for entry in content)


def test_embeddings_come_as_the_client_asks_by_default(client, running):
    answer = client.embeddings.create(model="m", input=["one", "two"])
    expected = running.server.llm.embed(["one", "two"])
    assert [entry.embedding for entry in answer.data] == [pytest.approx(row.tolist(), abs=1e-5) for row in expected]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (dict(messages=DIALOG, n=0), "n"),
        (dict(messages=DIALOG, n=17), "n"),
        (dict(messages=DIALOG, temperature="hot"), "temperature"),
        (dict(messages=DIALOG, extra_body={"something_new": 1}), "something_new"),
        (dict(messages=DIALOG, functions=[{"name": "f"}]), "functions"),
        (dict(messages=DIALOG, logit_bias={"99999": 1}), "logit_bias"),
        (dict(messages=[{"role": "user", "content": "x" * 300}]), "messages"),
        (dict(messages=[]), "messages"),
        (dict(messages=DIALOG, stream_options={"include_usage": True}), "stream_options"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(client, asked, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", **asked)
    assert caught.value.param == param
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


def test_a_prompt_that_is_too_long_has_its_code(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
