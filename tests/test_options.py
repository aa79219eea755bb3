"""The options that commands share: one table, and the flags that each command has always had."""

import inspect
from dataclasses import fields

import pytest
import typer

from llama import Llama, SamplingParams
from llama.__main__ import app
from llama.options import MODEL, SAMPLER, takes

MODEL_FLAGS = ["tokenizer", "chat-format", "max-seq-len", "device", "dtype", "quantization", "kv-dtype"]
SAMPLER_FLAGS = ["temperature", "top-p", "top-k", "repetition-penalty", "max-tokens", "stop", "seed"]
FLAGS = {
    "chat": ["system", "history", *MODEL_FLAGS, *SAMPLER_FLAGS],
    "complete": ["prompt", "stream", "echo", *MODEL_FLAGS, *SAMPLER_FLAGS],
    "batch": ["model", *MODEL_FLAGS],
    "convert": ["to", "shards", "max-shard-size", "dtype", "input_dir", "output_dir", "model_size"],
    "quantize": ["type"],
    "inspect": ["estimate", "max-seq-len", "max-batch-size", "ranks", "kv-dtype"],
    "verify": [],
    "perplexity": ["file", "encoding", "window", "stride", *MODEL_FLAGS],
}
FLAGS["complete"].remove("chat-format")
FLAGS["perplexity"].remove("chat-format")
FLAGS["perplexity"].remove("max-seq-len")


@pytest.mark.parametrize("name", FLAGS)
def test_a_command_has_its_flags(name):
    command = typer.main.get_command(app).commands[name]
    found = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
    assert sorted(found) == sorted(f"--{flag}" for flag in FLAGS[name])


def test_an_option_has_the_name_of_what_it_sets():
    assert {option.name for option in MODEL} <= set(inspect.signature(Llama.build).parameters)
    assert {option.name for option in SAMPLER} <= {field.name for field in fields(SamplingParams)}


def test_what_was_not_given_is_left_to_the_call():
    command = typer.Typer()
    given = []

    @command.command()
    @takes(load=MODEL, sample=SAMPLER.only("top_k", "max_tokens", "stop").with_defaults(max_tokens=256))
    def run(*, load: dict, sample: dict) -> None:
        given.append((load, sample))

    command(["--device", "cpu", "--stop", "a", "--stop", "b"], standalone_mode=False)
    assert given == [({"device": "cpu", "dtype": "auto", "kv_dtype": "auto"}, {"max_tokens": 256, "stop": ["a", "b"]})]
