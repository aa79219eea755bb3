"""A batch job of 500 lines over two actors, killed in the middle and begun again, against the job of one process."""

from __future__ import annotations

import json
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from support.replicas import command, save_replicated_model, wait_for_end

from llama import Llama
from llama.batch import Batch

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_LINES = 500
KINDS = [
    (
        "chat/completions",
        lambda i: {"messages": [{"role": "user", "content": f"hello {i} " * (i % 7)}], "temperature": 0},
    ),
    ("embeddings", lambda i: {"input": f"text {i}"}),
    ("completions", lambda i: {"prompt": f"quick {i}", "temperature": 0.8, "seed": i, "n": 2}),
    ("completions", lambda i: {"prompt": f"fox {i}" if i % 20 else [], "temperature": 0}),
]


def write_lines(path: Path) -> None:
    lines = []
    for number in range(NUM_LINES):
        name, body = KINDS[number % len(KINDS)]
        limit = {} if name == "embeddings" else {"max_tokens": 5 + number % 9}
        entry = {"custom_id": f"c{number}", "url": f"/v1/{name}", "body": body(number) | limit}
        lines.append(json.dumps(entry) if number % 50 != 7 else "not JSON")
    path.write_text("\n".join(lines))


def answers_in(path: Path) -> tuple[dict[int, Any], list[list[float]]]:
    """What was answered to each line, without what differs from run to run; and all vectors, which do in a last bit."""
    answers = sorted(map(json.loads, path.read_text().splitlines()), key=lambda answer: answer["line"])
    found, vectors = {}, []
    for answer in answers:
        assert answer["line"] not in found, "answered twice"
        body = (answer["response"] or {}).get("body", {})
        said = [(one.get("text"), one.get("message"), one["finish_reason"]) for one in body.get("choices", ())]
        vectors += [item["embedding"] for item in body.get("data", ())]
        usage = {name: count for name, count in body.get("usage", {}).items() if name != "prompt_tokens_details"}
        found[answer["line"]] = answer["custom_id"], answer["error"], said, usage
    return found, vectors


def test_a_job_that_was_killed_goes_on_and_equals_that_of_one_process(tmp_path):
    model = save_replicated_model(tmp_path)
    source, alone, out = tmp_path / "in.jsonl", tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    write_lines(source)
    Batch(Llama.build(model, max_seq_len=512, chat_format="llama2"), source, alone).run()

    flags = ("--max-seq-len", 512, "--chat-format", "llama2", "--replicas", 2)
    arguments = ("batch", source, out, "--model", model, *flags)
    with command(*arguments) as job:
        while not out.exists() or out.read_text().count('"error": null') == 0:
            assert job.process.poll() is None, job.read_all()
            sleep(0.01)
        family = job.family
        job.process.kill()
        assert wait_for_end(family, 120) == []
    num_answered = out.read_text().count('"error": null')
    assert num_answered < NUM_LINES - 30

    with command(*arguments) as job:
        told = job.read_all()
        assert job.process.wait() == 1, told  # some lines were refused
    assert f"{num_answered} answered before" in told
    found, vectors = answers_in(out)
    expected, expected_vectors = answers_in(alone)
    assert len(found) == NUM_LINES
    assert found == expected
    assert torch.allclose(torch.tensor(vectors), torch.tensor(expected_vectors), atol=1e-5)
