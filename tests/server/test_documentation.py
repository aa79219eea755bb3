"""What docs/serving.md shows is run as a reader would run it."""

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer
from support.adapter_files import save_adapter
from support.server import Running, serving
from support.tiny import ByteTokenizer, answering_model

from llama import Llama
from llama.__main__ import app

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(lambda: Llama(answering_model("Ok."), ByteTokenizer(), chat_format="llama2")) as server:
        yield server


def package(program: str) -> str:
    """The first that a program imports of what is not Python's own."""
    return re.findall(r"^from (\w+)", program, re.MULTILINE)[0]


@pytest.mark.parametrize("program", PROGRAMS, ids=package)
def test_the_programs_of_the_documentation_run(running, program, capsys):
    if importlib.util.find_spec(package(program)) is None:
        pytest.skip(f"{package(program)} is not installed")
    code = compile(program.replace(ADDRESS, running.url), "docs/serving.md", "exec")
    with ThreadPoolExecutor(1) as pool:  # a browser's driver may have an event loop in this thread
        pool.submit(exec, code, {}).result()
    assert "Ok." in capsys.readouterr().out


def test_the_documentation_has_a_program_for_each_client():
    assert list(map(package, PROGRAMS)) == ["openai", "langchain_core", "anthropic", "agents"]


def test_the_commands_of_the_documentation_that_ask_a_server_get_answers(running):
    command = re.findall(r"^curl .*?}'", DOCUMENT, re.DOTALL | re.MULTILINE)[0]
    done = subprocess.run(["bash", "-c", command.replace(ADDRESS, running.url)], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "Ok."


def test_the_command_that_loads_an_adapter_does(tmp_path):
    save_adapter(tmp_path / "sql-adapter", 1)
    command = re.findall(r"^curl .*?}'", DOCUMENT, re.DOTALL | re.MULTILINE)[1]
    with serving(lora_dir=tmp_path, admin_key="SECRET") as running:
        done = subprocess.run(["bash", "-c", command.replace(ADDRESS, running.url)], capture_output=True, text=True)
    assert done.stdout == "Success: LoRA adapter 'sql' added successfully."


def test_every_option_that_the_documentation_names_is_there():
    commands = typer.main.get_command(app).commands.values()
    known = {flag for command in commands for parameter in command.params for flag in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", DOCUMENT)) - {"--nproc_per_node", "--help"}
    assert named <= known
