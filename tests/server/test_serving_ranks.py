"""One model on two ranks, served; and what becomes of all when one ends or hangs."""

import json
import signal
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

import pytest
from support.adapter_files import save_adapter
from support.meta_files import save_meta, save_tokenizer
from support.processes import ServerProcesses, server_processes
from support.switched_ranks import build_unless_second
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> partial:
    directory: Path = tmp_path_factory.mktemp("ranks")
    args = tiny_args(vocab_size=400)
    tokenizer = save_tokenizer(directory / "tokenizer.model")
    save_meta(directory / "model", args, tiny_weights(args))
    return partial(Llama.build, directory / "model", tokenizer, max_seq_len=2048, device="cpu", dtype="fp32")


def stream(ranks: ServerProcesses) -> HTTPResponse:
    """A long answer that has begun."""
    connection = ranks.connection()
    body = {"model": "m", "prompt": [1, 2, 3], "stream": True, "ignore_eos": True, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.readline()
    return response


def answer(ranks: ServerProcesses, model: str) -> list[int]:
    body = {"model": model, "prompt": [1, 2, 3], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return post(ranks, "/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]


def post(ranks: ServerProcesses, path: str, body: object) -> dict:
    connection = ranks.connection()
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", "x-api-key": "boss"})
    text = connection.getresponse().read()
    return json.loads(text) if text.startswith(b"{") else text.decode()


@pytest.mark.parametrize("num_stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_load_adapters_together(build, tmp_path, num_stages):
    save_adapter(tmp_path / "a", 1)
    save_adapter(tmp_path / "wrong", 1, dim=128)
    alone = build()
    alone.load_adapter("x", tmp_path / "a")
    alone.load_adapter("half", f"{tmp_path}/a=0.5")
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    expected = {name: alone.complete([[1, 2, 3]], params, name)[0].tokens for name in (None, "x", "half")}
    build = partial(build, pipeline_parallel_size=num_stages)
    with server_processes(build, 2, lora_dir=tmp_path, admin_key="boss") as ranks:
        assert "added successfully" in post(ranks, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a"})
        assert answer(ranks, "x") == expected["x"]
        refused = post(ranks, "/v1/load_lora_adapter", {"lora_name": "y", "lora_path": "wrong"})
        assert "the base model's has [64, 64]" in refused["error"]["message"]
        assert post(ranks, "/lora-adapters", [{"id": 0, "scale": 0.5}]) == {"success": True}
        assert answer(ranks, "m") == expected["half"]
        assert "removed successfully" in post(ranks, "/v1/unload_lora_adapter", {"lora_name": "x"})
        assert answer(ranks, "x") == expected[None]


def test_ranks_end_together_when_the_first_is_told_to(build):
    with server_processes(build, 2, shutdown_timeout=0) as ranks:
        answer = stream(ranks)
        ranks.send(signal.SIGTERM, rank=1)  # torchrun sends it to all: it is the first rank's to answer
        ranks.send(signal.SIGTERM)
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert ranks.exit_statuses() == [0, 0]


def test_a_rank_that_is_killed_ends_all_and_streams_are_told(build):
    with server_processes(build, 2) as ranks:
        answer = stream(ranks)
        ranks.send(signal.SIGKILL, rank=1)
        *_, error, done, _ = answer.read().decode().split("\n\n")
        assert json.loads(error.strip().removeprefix("data: "))["error"]["message"] == "the model has failed"
        assert done == "data: [DONE]"
        assert ranks.exit_statuses() == [1, -signal.SIGKILL]
        assert "llama: a rank has ended or a step has failed, and the ranks cannot go on together" in ranks.told


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_nothing_happens_is_missed(build, victim):
    with server_processes(build, 2) as ranks:
        ranks.send(signal.SIGKILL, victim)
        assert sorted(ranks.exit_statuses()) == [-signal.SIGKILL, 1]
        assert "the ranks cannot go on together" in ranks.told


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_others_with_a_word(build, victim):
    with server_processes(build, 2, rank_timeout=1) as ranks:
        ranks.send(signal.SIGSTOP, victim)
        ranks.read_until("nothing was heard of the other ranks for 1 s")
        ranks.send(signal.SIGKILL, victim)
        assert sorted(ranks.exit_statuses()) == [-signal.SIGKILL, 1]


def test_a_machine_that_vanishes_ends_the_server_with_a_word_to_its_streams(build):
    with server_processes(build, 2, {"LLAMA_HEARTBEAT_TIMEOUT": "3"}) as ranks:
        answer = stream(ranks)
        ranks.send(signal.SIGSTOP, rank=1)
        *_, error, done, _ = answer.read().decode().split("\n\n")
        assert json.loads(error.strip().removeprefix("data: "))["error"]["message"] == "the model has failed"
        assert done == "data: [DONE]"
        ranks.send(signal.SIGKILL, rank=1)
        assert ranks.exit_statuses() == [1, -signal.SIGKILL]
        assert "llama: nothing was heard of rank 1 on " in ranks.told


def test_a_rank_that_was_only_held_up_goes_on(build):
    with server_processes(build, 2) as ranks:
        expected, answer = stream(ranks).read(), stream(ranks)
        ranks.send(signal.SIGSTOP, rank=1)
        ranks.send(signal.SIGCONT, rank=1)
        texts = [
            [json.loads(frame[6:])["choices"] for frame in text.decode().split("\n\n") if frame.startswith("data: {")]
            for text in (expected, answer.read())
        ]
        assert texts[0] == texts[1] != []


def test_what_one_rank_alone_cannot_load_is_refused_with_its_reason_and_the_old_model_answers(tmp_path):
    folder = tmp_path / "models"
    args = tiny_args(vocab_size=400)
    for name in ("old", "new"):
        save_meta(folder / name, args, tiny_weights(args))
        save_tokenizer(folder / name / "tokenizer.model")
    save_adapter(tmp_path / "adapters" / "a", 1)
    built = partial(build_unless_second, folder / "old")
    settings = {"model_dir": folder, "lora_dir": tmp_path / "adapters", "admin_key": "boss"}
    with server_processes(built, 2, **settings) as ranks:
        expected = answer(ranks, "m")
        refused = post(ranks, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a"})["error"]["message"]
        assert "rank 1: this machine has no such file" in refused
        refused = post(ranks, "/v1/internal/model/load", {"model_name": "new"})["error"]["message"]
        assert "new could not be loaded: rank 1: this machine has no such file; old is there again" in refused
        assert answer(ranks, "m") == expected
