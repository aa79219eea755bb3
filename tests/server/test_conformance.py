"""What others have written to tell a server that keeps to the API from one that does not."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import Running, serving
from support.tiny import ByteTokenizer, answering_model

from llama import Llama

UNSERVED = {  # the model sees no images
    "openai-chat": {"chat-image-input"},
    "anthropic": {"anth-image-input"},
    "open-responses": {"image-input"},
}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(lambda: Llama(answering_model("Ok."), ByteTokenizer(), chat_format="vicuna"), ollama=True) as server:
        yield server


@pytest.mark.parametrize("form", UNSERVED)
def test_llm_comply_finds_nothing_wrong(running, form):
    command = [Path(sys.executable).with_name("llm-comply"), "--format", form, "--json"]
    command += ["-u", f"{running.url}/v1", "-k", "k", "-m", "m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = json.loads(done.stdout)["results"]
    wrong = {result["id"]: result["errors"] for result in results if result["status"] == "failed"}
    assert wrong.keys() <= UNSERVED[form], wrong
    assert sum(result["status"] == "passed" for result in results) >= 5


CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
]


def wrong_answers(url: str, folder: Path, num_examples: int, phases: str) -> str:
    """What schemathesis finds, which asks every operation for what it allows, and for what it does not."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--mode", "all"]
    command += ["--phases", phases, "--max-examples", num_examples, "--seed", 1, "--checks", ",".join(CHECKS)]
    command += ["--generation-database", "none", "--no-color", "--suppress-health-check", "all"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_no_request_breaks_the_server_or_gets_a_status_that_is_not_documented(running, tmp_path):
    assert wrong_answers(running.url, tmp_path, 8, "fuzzing") == ""


@pytest.mark.slow
def test_no_request_of_many_breaks_the_server(running, tmp_path):
    assert wrong_answers(running.url, tmp_path, 50, "coverage,fuzzing") == ""
