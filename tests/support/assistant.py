"""A model that asks one tool where somebody is, another how the weather is there, and then says so."""

from __future__ import annotations

import json
import re

from llama import Llama
from llama.chat.tools import TOOL_FORMATS, ToolCall
from support.scripted import scripted_llm

RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
QUESTION = "What is the weather like where Ada is?"
CITIES = {"Ada": "Oslo"}
WEATHER = {"Oslo": "snowy"}
ANSWER = "Ada is in Oslo, where it is snowy."


def assistant(city_tool: str = "get_city", weather_tool: str = "get_weather") -> Llama:
    """`city_tool` takes a `name`, `weather_tool` a `city`; what it says comes from their results alone."""
    write = TOOL_FORMATS["hermes"]().write

    def says(prompt: str) -> str:
        results, is_json = RESULT.findall(prompt), "as JSON" in prompt
        if not results:
            return write([ToolCall(city_tool, '{"name": "Ada"}')])
        if len(results) == 1:
            call = ToolCall(weather_tool, json.dumps({"city": results[0]}))
            return write([call]) if is_json else f"Let me see.\n{write([call])}"
        if is_json:
            return json.dumps({"city": results[0], "weather": results[1]})
        return f"Ada is in {results[0]}, where it is {results[1]}."

    return scripted_llm([], says)
