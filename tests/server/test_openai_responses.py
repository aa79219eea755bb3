"""OpenAI's own package through its responses."""

from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from support.server import Running, serving, tiny_llm

from llama import SamplingParams

DIALOG = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    city: Literal["Oslo", "Paris"]
    is_wet: bool


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(lambda: tiny_llm(max_seq_len=1024)) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response_is_the_answer_of_the_library(client, running):
    response = client.responses.create(model="m", input="hi", temperature=0, max_output_tokens=8)
    [expected] = running.server.llm.chat([DIALOG], SamplingParams(temperature=0.0, max_tokens=8))
    assert response.output_text == expected.text
    assert response.usage.output_tokens == len(expected.tokens)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_streamed_response_adds_up_to_the_same(client):
    asked = dict(model="m", input=DIALOG, max_output_tokens=12, temperature=1, extra_body={"seed": 3})
    whole = client.responses.create(**asked)
    text, last = "", None
    with client.responses.stream(**asked) as stream:
        for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
            last = event
    assert text == whole.output_text
    assert last.type == "response.incomplete"
    assert last.response.output_text == text
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_an_answer_comes_as_an_object_of_a_class(client):
    asked = dict(model="m", input="hi", temperature=1.2, extra_body={"logit_bias": {"34": 4}})
    response = client.responses.parse(**asked, text_format=Weather)
    assert isinstance(response.output_parsed, Weather)
    with client.responses.stream(**asked, text_format=Weather) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def test_a_tools_arguments_come_as_an_object_of_a_class(client):
    with client.responses.stream(
        model="m",
        input="hi",
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body={"logit_bias": {"34": 4}},
    ) as stream:
        kinds = [event.type for event in stream]
        [call] = stream.get_final_response().output
    assert isinstance(call.parsed_arguments, Weather)
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]


def test_what_would_have_to_be_kept_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input="hi", previous_response_id="resp_1")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
