"""Loops of two tools, as the packages run them that people write agents with."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel
from support.assistant import ANSWER, CITIES, QUESTION, WEATHER, assistant
from support.loops import run_async
from support.server import Running, serving

MOST_TURNS = 4


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(assistant) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def get_city(name: str) -> str:
    """In which city somebody is."""
    return CITIES[name]


def get_weather(city: str) -> str:
    """What the weather in a city is like."""
    return WEATHER[city]


FUNCTIONS = {function.__name__: function for function in (get_city, get_weather)}
PARAMETERS = {
    name: {"type": "object", "properties": {key: {"type": "string"}}, "required": [key], "additionalProperties": False}
    for name, key in (("get_city", "name"), ("get_weather", "city"))
}
DESCRIBED = [
    {"name": name, "description": function.__doc__, "parameters": PARAMETERS[name], "strict": True}
    for name, function in FUNCTIONS.items()
]


def called(name: str, arguments: str) -> str:
    return FUNCTIONS[name](**json.loads(arguments))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_through_chat_completions(client, is_streamed):
    tools = [{"type": "function", "function": described} for described in DESCRIBED]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    reasons = []
    for _ in range(MOST_TURNS):
        if is_streamed:
            with client.chat.completions.stream(model="m", messages=messages, tools=tools) as stream:
                choice = stream.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(model="m", messages=messages, tools=tools).choices[0]
        messages.append(choice.message)
        reasons.append(choice.finish_reason)
        if not choice.message.tool_calls:
            break
        for call in choice.message.tool_calls:
            result = called(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert messages[-1].content == ANSWER
    assert [message.content for message in messages[1::2]] == [None, "Let me see.", ANSWER]
    assert reasons == ["tool_calls", "tool_calls", "stop"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_through_responses(client, is_streamed):
    asked = dict(model="m", tools=[{"type": "function", **described} for described in DESCRIBED])
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(MOST_TURNS):
        if is_streamed:
            with client.responses.stream(**asked, input=items) as stream:
                response = stream.get_final_response()
        else:
            response = client.responses.create(**asked, input=items)
        items += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        for call in calls:
            result = called(call.name, call.arguments)
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    assert response.output_text == ANSWER
    kinds = [item["type"] if isinstance(item, dict) else item.type for item in items[1:]]
    assert kinds == [
        "function_call",
        "function_call_output",
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_anthropic_through_messages(running, is_streamed):
    tools = [{"name": d["name"], "description": d["description"], "input_schema": d["parameters"]} for d in DESCRIBED]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client:
        for _ in range(MOST_TURNS):
            asked = dict(model="m", messages=messages, tools=tools, max_tokens=300)
            if is_streamed:
                with client.messages.stream(**asked) as stream:
                    message = stream.get_final_message()
            else:
                message = client.messages.create(**asked)
            messages.append({"role": "assistant", "content": message.content})
            if message.stop_reason != "tool_use":
                break
            results = [
                {"type": "tool_result", "tool_use_id": b.id, "content": FUNCTIONS[b.name](**b.input)}
                for b in message.content
                if b.type == "tool_use"
            ]
            messages.append({"role": "user", "content": results})
    assert [block.text for block in message.content] == [ANSWER]
    assert message.stop_reason == "end_turn"
    assert len(messages) == 6


class Report(BaseModel):
    city: str
    weather: str


SPOKEN = ("Be brief.", None, ANSWER)
WRITTEN = ("Answer as JSON.", Report, Report(city="Oslo", weather="snowy"))


@pytest.mark.parametrize(
    ("api", "is_streamed", "asked"),
    [
        ("chat_completions", False, SPOKEN),
        ("chat_completions", True, SPOKEN),
        ("responses", False, SPOKEN),
        ("responses", True, SPOKEN),
        ("chat_completions", True, WRITTEN),
        ("responses", False, WRITTEN),
    ],
)
def test_openai_agents(running, api, is_streamed, asked):
    instructions, output_type, output = asked
    import agents

    agents.set_tracing_disabled(True)

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            kinds = {
                "chat_completions": agents.OpenAIChatCompletionsModel,
                "responses": agents.OpenAIResponsesModel,
            }
            agent = agents.Agent(
                name="Guide",
                instructions=instructions,
                output_type=output_type,
                model=kinds[api](model="m", openai_client=client),
                tools=[agents.function_tool(function) for function in FUNCTIONS.values()],
            )
            config = agents.RunConfig(tracing_disabled=True)
            if not is_streamed:
                return await agents.Runner.run(agent, QUESTION, run_config=config, max_turns=MOST_TURNS)
            result = agents.Runner.run_streamed(agent, QUESTION, run_config=config, max_turns=MOST_TURNS)
            async for _ in result.stream_events():
                pass
            return result

    result = run_async(ask())
    assert result.final_output == output
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs == ["Oslo", "snowy"]
