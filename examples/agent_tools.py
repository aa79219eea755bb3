"""A loop in which the model calls functions until it has what it needs for an answer.

llama serve                          # in another terminal; the larger the model, the better it chooses
pip install openai
python examples/agent_tools.py
"""

import json
from typing import Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

QUESTION = "What is the weather like where Ada is?"
MOST_TURNS = 6


class GetCity(BaseModel):
    """In which city a person is."""

    name: Literal["Ada", "Grace"]  # the server keeps calls to their schemas

    def run(self) -> str:
        return {"Ada": "Oslo", "Grace": "Paris"}[self.name]


class GetWeather(BaseModel):
    """What the weather in a city is like."""

    city: Literal["Oslo", "Paris"]

    def run(self) -> str:
        return {"Oslo": "snowy", "Paris": "sunny"}[self.city]


TOOLS = {tool.__name__: tool for tool in (GetCity, GetWeather)}

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
messages = [{"role": "user", "content": QUESTION}]
for turn in range(MOST_TURNS):
    answer = client.chat.completions.create(
        model="default",
        messages=messages,
        tools=[pydantic_function_tool(tool) for tool in TOOLS.values()],
        tool_choice="required" if turn == 0 else "auto",  # the smallest models call nothing unless they have to
        temperature=0,
        max_tokens=128,
    )
    message = answer.choices[0].message
    messages.append(message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        result = TOOLS[call.function.name](**arguments).run()
        print(f"{call.function.name}({arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
