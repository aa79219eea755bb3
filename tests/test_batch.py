import json
from pathlib import Path

import pytest
from support.meta_files import save_meta, save_tokenizer
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams
from llama.batch import Batch, finished_lines

ARGS = tiny_args(vocab_size=400)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Llama:
    directory = tmp_path_factory.mktemp("batch")
    save_tokenizer(directory / "tokenizer.model")
    return Llama.build(
        save_meta(directory / "model", ARGS, tiny_weights(ARGS)), max_seq_len=128, dtype="fp32"
    )


def line(custom_id: str, url: str = "/v1/completions", **body) -> str:
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": url, "body": {"max_tokens": 4, **body}}
    )


CHAT = line(
    "chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], temperature=0, n=2
)
TEXT = line("text", prompt="quick fox", temperature=0, logprobs=2, echo=True)
SEVERAL = line("several", prompt=["one", "two"], temperature=0, n=2)
VECTOR = json.dumps({"custom_id": "vector", "url": "/v1/embeddings", "body": {"input": ["one", "two"]}})


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
    assert bodies["chat"]["choices"][0]["message"] == {"role": "assistant", "content": expected.text}

    [choice] = bodies["text"]["choices"]
    assert choice["text"].startswith("quick fox")
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
    assert choice["logprobs"]["token_logprobs"][0] is None
    num_prompt_tokens = len(llm.tokenizer.encode("quick fox", bos=True, eos=False))
    assert bodies["text"]["usage"]["prompt_tokens"] == num_prompt_tokens
    assert (
        bodies["text"]["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) - num_prompt_tokens
    )

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
    assert counts.skipped == 2
    assert counts.answered + counts.failed == 2
    again = {a["custom_id"]: a for a in map(json.loads, out.read_text().splitlines())}
    for name, answer in whole.items():
        texts = [
            [c["text"] if "text" in c else c["message"] for c in a["response"]["body"]["choices"]]
            for a in (answer, again[name])
            if a["error"] is None
        ]
        assert texts[:1] == texts[1:]
    assert Batch(llm, tmp_path / "in.jsonl", out).run().skipped == 4


def test_answers_to_another_file_are_not_added_to(llm, tmp_path):
    run(llm, tmp_path, [TEXT])
    (tmp_path / "in.jsonl").write_text(line("other", prompt="x"))
    with pytest.raises(ValueError, match="answers another file: its line 1 is 'text', not 'other'"):
        Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").run()
    (tmp_path / "out.jsonl").write_text("something else\n")
    with pytest.raises(ValueError, match="does not hold answers of this command"):
        finished_lines(tmp_path / "out.jsonl")


def test_nothing_stays_referenced_after_a_job(llm, tmp_path):
    run(
        llm, tmp_path, [CHAT, TEXT, SEVERAL, VECTOR] + [line(str(i), prompt=f"number {i}") for i in range(40)]
    )
    assert llm.engine.stats().num_referenced_blocks == 0
