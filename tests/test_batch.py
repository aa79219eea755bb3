import io
import json
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest
from support.meta_files import save_meta, save_tokenizer
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams, batch, engine
from llama.batch import Batch, Fingerprints, finished_lines, locked
from llama.chat import UNSAFE_ERROR

ARGS = tiny_args(vocab_size=400)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Llama:
    directory = tmp_path_factory.mktemp("batch")
    save_tokenizer(directory / "tokenizer.model")
    return Llama.build(save_meta(directory / "model", ARGS, tiny_weights(ARGS)), max_seq_len=128, dtype="fp32")


def line(custom_id: str, url: str = "/v1/completions", **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"max_tokens": 4, **body}})


CHAT = line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], temperature=0, n=2)
TEXT = line("text", prompt="quick fox", temperature=0, logprobs=2, echo=True)
SEVERAL = line("several", prompt=["one", "two"], temperature=0, n=2)
VECTOR = json.dumps({"custom_id": "vector", "url": "/v1/embeddings", "body": {"input": ["one", "two"]}})


def answers_in(path: Path) -> dict[str, dict]:
    return {answer["custom_id"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def run(llm: Llama, directory: Path, lines: list[str]) -> dict[str, dict]:
    """The answers by custom id."""
    (directory / "in.jsonl").write_text("\n".join(lines) + "\n")
    Batch(llm, directory / "in.jsonl", directory / "out.jsonl").run()
    answers = [json.loads(text) for text in (directory / "out.jsonl").read_text().splitlines()]
    assert len({answer["line"] for answer in answers}) == len(answers)
    return {answer["custom_id"]: answer for answer in answers}


def test_every_kind_of_request_gets_its_kind_of_answer(llm, tmp_path):
    answers = run(llm, tmp_path, [CHAT, TEXT, SEVERAL, VECTOR])
    assert set(answers) == {"chat", "text", "several", "vector"}
    assert all(answer["error"] is None for answer in answers.values())
    bodies = {name: answer["response"]["body"] for name, answer in answers.items()}

    assert bodies["chat"]["object"] == "chat.completion"
    assert [choice["index"] for choice in bodies["chat"]["choices"]] == [0, 1]
    dialog = [{"role": "user", "content": "hello"}]
    [expected] = llm.chat([dialog], SamplingParams(temperature=0.0, max_tokens=4))
    message = {"role": "assistant", "content": expected.text, "refusal": None, "annotations": []}
    assert bodies["chat"]["choices"][0]["message"] == message

    [choice] = bodies["text"]["choices"]
    assert choice["text"].startswith("quick fox")
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
    assert choice["logprobs"]["token_logprobs"][0] is None
    num_prompt_tokens = len(llm.tokenizer.encode("quick fox", bos=True, eos=False))
    assert bodies["text"]["usage"]["prompt_tokens"] == num_prompt_tokens
    assert bodies["text"]["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) - num_prompt_tokens

    assert len(bodies["several"]["choices"]) == 4
    assert [len(item["embedding"]) for item in bodies["vector"]["data"]] == [ARGS.dim] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ('{"url": "/v1/completions"}', "line 2 has no custom_id"),
        (line("text", prompt="again"), "custom_id 'text' stands on an earlier line too"),
        (line("bad", "/v1/images", prompt="x"), "url is '/v1/images'"),
        (line("bad", prompt="x", tools=[]), "tools"),
        (line("bad", prompt="x", temperature=float("nan")), "temperature"),
        (line("bad", prompt="x", logit_bias={"a": 1}), "logit_bias holds 'a'"),
        (line("bad"), "prompt"),
        (line("bad", prompt=[1] * 200), "the prompt has 200 tokens, but max_seq_len is 128"),
        (line("bad", prompt=[4000]), "4000"),
        (line("bad", "/v1/chat/completions", messages=[]), "the dialog is empty"),
    ],
)
def test_a_bad_line_becomes_an_error_line_and_not_the_end_of_the_job(llm, tmp_path, bad, message):
    (tmp_path / "in.jsonl").write_text("\n".join([TEXT, bad, CHAT]))
    counts = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (counts.answered, counts.failed) == (2, 1)
    answers = {a["line"]: a for a in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert message in answers[2]["error"]["message"]
    assert answers[2]["response"] is None
    assert answers[1]["error"] is answers[3]["error"] is None


def test_a_job_that_was_stopped_goes_on_where_it_was(llm, tmp_path):
    whole = run(llm, tmp_path, [TEXT, "not json", CHAT, SEVERAL])
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:20])
    counts = Batch(llm, tmp_path / "in.jsonl", out).run()
    assert (counts.skipped, counts.answered, counts.failed) == (1, 2, 1)  # the failed line is tried again
    again = {a["custom_id"]: a for a in map(json.loads, out.read_text().splitlines())}
    for name, answer in whole.items():
        texts = [
            [c["text"] if "text" in c else c["message"] for c in a["response"]["body"]["choices"]]
            for a in (answer, again[name])
            if a["error"] is None
        ]
        assert texts[:1] == texts[1:]
    assert Batch(llm, tmp_path / "in.jsonl", out).run().skipped == 3


def test_answers_to_another_file_are_not_added_to(llm, tmp_path):
    run(llm, tmp_path, [TEXT])
    (tmp_path / "in.jsonl").write_text(line("other", prompt="x"))
    with pytest.raises(ValueError, match="answers another file: its line 1 is 'text', not 'other'"):
        Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    (tmp_path / "out.jsonl").write_text("something else\n")
    with pytest.raises(ValueError, match="does not hold answers of this command"):
        finished_lines(tmp_path / "out.jsonl")


def test_nothing_stays_referenced_after_a_job(llm, tmp_path):
    run(llm, tmp_path, [CHAT, TEXT, SEVERAL, VECTOR] + [line(str(i), prompt=f"number {i}") for i in range(40)])
    assert llm.engine.stats().num_referenced_blocks == 0


def test_a_dialog_that_its_format_refuses_is_answered_as_llm_chat_answers_it(llm, tmp_path):
    unsafe = [{"role": "user", "content": "x [INST] y"}]
    refused = line("refused", "/v1/chat/completions", messages=unsafe, n=2)
    answers = run(llm, tmp_path, [refused, CHAT])
    choices = answers["refused"]["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == [UNSAFE_ERROR] * 2
    assert [choice["message"]["refusal"] for choice in choices] == [UNSAFE_ERROR] * 2
    assert {choice["finish_reason"] for choice in choices} == {"content_filter"}
    assert answers["chat"]["error"] is None


def test_embeddings_share_steps(llm, tmp_path, monkeypatch):
    alone = {str(i): llm.embed([f"text {i}"])[0].tolist() for i in range(6)}
    num_steps = []
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: num_steps.append(1) or step())
    lines = [json.dumps({"custom_id": i, "url": "/v1/embeddings", "body": {"input": f"text {i}"}}) for i in alone]
    answers = run(llm, tmp_path, lines)
    assert len(num_steps) < len(lines)
    for custom_id, vector in alone.items():
        found = answers[custom_id]["response"]["body"]["data"][0]["embedding"]
        assert found == pytest.approx(vector, abs=1e-4)


# --- what a file may hold


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_file_in_any_encoding_of_json_is_read(llm, tmp_path, encoding):
    (tmp_path / "in.jsonl").write_text(f"{TEXT}\n{CHAT}\n", encoding=encoding)
    counts = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (counts.answered, counts.failed) == (2, 0)


def test_a_line_that_is_not_utf_8_fails_alone(llm, tmp_path):
    latin = line("latin", prompt="caf\xe9").replace("\\u00e9", "\xe9").encode("latin-1")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([TEXT.encode(), latin, CHAT.encode()]))
    counts = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (counts.answered, counts.failed) == (2, 1)
    message = answers_in(tmp_path / "out.jsonl")[None]["error"]["message"]
    assert message.startswith("line 2 is not text in UTF-8, from character ")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (line("odd", ["/v1/completions"], prompt="x"), "url is ['/v1/completions']"),
        (
            json.dumps({"custom_id": "odd", "url": "DEEP"}).replace('"DEEP"', "[" * 400 + "]" * 400),
            "url is [[[[",
        ),
        (line("odd", prompt="x", n=10**12), "n is 1000000000000: at most 128 answers are given to a prompt"),
        (line("odd", prompt=[[]]), "the prompt is empty"),
        (json.dumps({"custom_id": "odd", "url": "/v1/completions"}), "body: "),
        ("[" * 100_000, "line 2 is not JSON: maximum recursion depth exceeded"),
        (line("odd", prompt=[]), "prompt is empty: give a text, token ids, or a list of either"),
        (line("odd", "/v1/embeddings").replace('"max_tokens": 4', '"input": []'), "input is empty"),
        (line("odd", prompt="x", stream=True), "stream"),
        (
            line("odd", "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], tools=[{}]),
            "tools",
        ),
        (
            line(
                "odd",
                "/v1/chat/completions",
                messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            ),
            "message 1 has a part that is no text",
        ),
    ],
)
def test_an_odd_line_fails_alone(llm, tmp_path, odd, message):
    (tmp_path / "in.jsonl").write_text("\n".join([TEXT, odd, CHAT]))
    counts = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (counts.answered, counts.failed) == (2, 1)
    answers = {a["line"]: a for a in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert message in answers[2]["error"]["message"]


def test_an_answer_is_one_line_whatever_is_in_it(llm, tmp_path):
    odd = "a\x85b\u2028c\u2029d\x1ce"
    answers = run(llm, tmp_path, [line("odd", prompt="x", model=odd), TEXT])
    assert answers["odd"]["response"]["body"]["model"] == odd


def test_half_a_surrogate_pair_costs_nothing(llm, tmp_path):
    answers = run(llm, tmp_path, [line("\ud83d", prompt="half \ud83d", model="\ud83d", echo=True), TEXT])
    assert answers["\ud83d"]["response"]["body"]["model"] == "\ud83d"
    assert answers["\ud83d"]["error"] is None
    assert Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run().skipped == 2


def test_standard_input_and_pipes_are_read(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(f"{TEXT}\n{CHAT}".encode()))))
    assert Batch(llm, Path("-"), tmp_path / "out.jsonl").run().answered == 2
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(f"{TEXT}\n{SEVERAL}",))
    writer.start()
    assert Batch(llm, tmp_path / "pipe", tmp_path / "other.jsonl").run().answered == 2
    writer.join()


# --- a job that is run again


def test_a_failed_line_is_tried_again_and_its_answer_replaces_the_failure(llm, tmp_path):
    run(llm, tmp_path, [TEXT, line("long", prompt=[1] * 200), CHAT])
    (tmp_path / "in.jsonl").write_text("\n".join([TEXT, line("long", prompt=[1] * 20), CHAT]))
    counts = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (counts.skipped, counts.answered, counts.failed) == (2, 1, 0)
    entries = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(entry["custom_id"] for entry in entries) == ["chat", "long", "text"]
    assert all(entry["error"] is None for entry in entries)


def test_a_line_that_fails_again_is_counted_again(llm, tmp_path):
    run(llm, tmp_path, [TEXT, line("long", prompt=[1] * 200)])
    counts = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (counts.skipped, counts.answered, counts.failed) == (1, 0, 1)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_a_file_of_something_else_is_left_as_it_is(llm, tmp_path):
    (tmp_path / "in.jsonl").write_text(TEXT)
    (tmp_path / "out.jsonl").write_text("my notes")
    with pytest.raises(ValueError, match="does not hold answers of this command"):
        Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    assert (tmp_path / "out.jsonl").read_text() == "my notes"


def test_a_job_that_is_running_is_not_started_again(llm, tmp_path):
    (tmp_path / "in.jsonl").write_text(TEXT)
    job = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with (
        locked(tmp_path / "out.jsonl"),
        pytest.raises(ValueError, match=r"out.jsonl: another run is writing to it"),
    ):
        job.run()
    assert job.run().answered == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


# --- a job of any length


def test_only_lines_on_their_way_are_held(llm, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Line(batch.Line):
        def __init__(self, number):
            super().__init__(number)
            alive.add(self)

    monkeypatch.setattr(batch, "Line", Line)
    monkeypatch.setattr(engine, "MAX_OPEN", 8)
    lines = [line(str(i), prompt=[1 + i] * 3, max_tokens=1 + i % 3) for i in range(100)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    job = Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert job.run(lambda counts: most.append(len(alive))).answered == 100
    assert max(most) <= 2 * 8


def test_fingerprints_know_what_was_added_and_nothing_else(monkeypatch):
    monkeypatch.setattr(Fingerprints, "MOST_RECENT", 4)
    names = Fingerprints()
    for number in range(10):
        names.add(number, f"name {number}")
    assert all(names.has(number, f"name {number}") for number in range(10))
    assert not any(names.has(number, f"name {number + 1}") or names.has(number) for number in range(10))
