"""Anthropic's own package, with nothing changed but its base URL."""

import anthropic
import pytest
from support.server import Running, serving

USER = {"role": "user", "content": "hi"}
ASKED = {"model": "m", "max_tokens": 12, "messages": [USER], "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(running: Running) -> anthropic.Anthropic:
    with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_adds_up_to_the_message(client):
    message = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert message.content[0].text == text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (message.stop_reason, message.usage.output_tokens)


def test_the_beta_address_is_the_same(client):
    assert client.beta.messages.create(**ASKED).content[0].text == client.messages.create(**ASKED).content[0].text


def test_a_stop_sequence_and_a_beginning_are_taken(client):
    text = client.messages.create(**ASKED).content[0].text
    begun = {**ASKED, "messages": [USER, {"role": "assistant", "content": "Well"}]}
    assert client.messages.create(**begun).content[0].text != text
    message = client.messages.create(**ASKED, stop_sequences=[text[3]])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", text[3])


def test_tokens_are_counted(client):
    counted = client.messages.count_tokens(model="m", messages=[USER], system="Be brief.")
    usage = client.messages.create(**ASKED, system="Be brief.").usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_are_those_that_the_client_knows(client, running):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**ASKED, tools=[{"name": "f", "input_schema": {"type": 7}}] * 2)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.body["error"]["message"].startswith("two tools have one name")
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        status, body = running.post(path, {"model": "m"})
        assert (status, body["type"]) == (400, "error")
    with (
        serving(max_queue=1, strict_model=True) as strict,
        anthropic.Anthropic(base_url=strict.url, api_key="none", max_retries=0) as other,
        pytest.raises(anthropic.NotFoundError),
    ):
        other.messages.create(**ASKED)
