"""The programs in examples/ are run as a reader would run them, against a server whose model says what they need."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from support.assistant import ANSWER, assistant
from support.scripted import scripted_llm
from support.server import serving

from llama import Llama

EXAMPLES = Path(__file__).parents[2] / "examples"
ADDRESS = "http://127.0.0.1:8000"


def run(name: str, build: Callable[[], Llama]) -> None:
    program = (EXAMPLES / name).read_text(encoding="utf-8")
    assert ADDRESS in program
    with serving(build) as running:
        exec(compile(program.replace(ADDRESS, running.url), name, "exec"), {"__name__": "__main__"})


def test_facts_are_taken_out_of_a_text(capsys):
    person = '{"name": "Ada", "born": 1815, "likes": ["horses", "music"]}'
    run("extract_json.py", lambda: scripted_llm([], lambda prompt: person if "1815" in prompt else "No text."))
    assert capsys.readouterr().out.endswith("Ada, born in 1815, likes horses, music\n")


def test_a_question_is_answered_by_way_of_two_tools(capsys):
    run("agent_tools.py", lambda: assistant("GetCity", "GetWeather"))
    *_, city, weather, answer = capsys.readouterr().out.splitlines()
    assert (city, weather) == ("GetCity({'name': 'Ada'}) -> Oslo", "GetWeather({'city': 'Oslo'}) -> snowy")
    assert answer == ANSWER


@pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="langchain-openai is not installed")
def test_a_chain_of_two_questions_is_answered(capsys):
    run(
        "langchain_chain.py", lambda: scripted_llm([], lambda prompt: "Wet." if "sentences" in prompt else prompt[-12:])
    )
    assert "Wet." in capsys.readouterr().out
