"""The options that commands share: one table, and the flags that each command has always had."""

import inspect
from dataclasses import fields

import pytest
import typer

from llama import Llama, SamplingParams
from llama.__main__ import app
from llama.options import CONFIG, MODEL, SAMPLER, Option, Options, takes
from llama.server.settings import SERVER

MODEL_FLAGS = ["tokenizer", "chat-format", "tool-format", "max-seq-len", "device", "dtype", "quantization"]
MODEL_FLAGS += ["pipeline-parallel-size"]
MODEL_FLAGS += ["kv-cache-memory", "kv-dtype", "lora", "draft", "compile", "trust-compiled"]
SAMPLER_FLAGS = ["temperature", "top-p", "top-k", "repetition-penalty", "max-tokens", "stop", "seed"]
REPLICA_FLAGS = ["replicas", "ray-address"]
SERVER_FLAGS = [option.name.replace("_", "-") for option in SERVER]
TUTORIAL_FLAGS = ["model_path", "gpus", "infer_dtype", "model_source", "model", "cpu"]
FLAGS = {
    "chat": ["system", "history", "url", "api-key", *MODEL_FLAGS, *SAMPLER_FLAGS],
    "complete": ["prompt", "stream", "echo", "json-schema", "regex", "grammar", *MODEL_FLAGS, *SAMPLER_FLAGS],
    "batch": ["model", *REPLICA_FLAGS, *MODEL_FLAGS],
    "convert": ["to", "shards", "max-shard-size", "dtype", "lora", "input_dir", "output_dir", "model_size"],
    "push": ["private", "overwrite"],
    "quantize": ["type", "lora"],
    "export": ["batch-size", "sequence-length", "num-cores", "tokenizer", "dtype", "quantization", "kv-dtype"],
    "inspect": ["estimate", "max-seq-len", "max-batch-size", "ranks", "kv-dtype"],
    "serve": [
        "config",
        *REPLICA_FLAGS,
        *TUTORIAL_FLAGS,
        *MODEL_FLAGS,
        *(option.name.replace("_", "-") for option in SERVER),
    ],
    "verify": [],
    "bench": [
        "shape",
        "precision",
        "vs",
        "works",
        "rounds",
        "threads",
        "json",
        "plot",
        "device",
        "kv-dtype",
        "compile",
        "draft",
    ],
    "perplexity": ["file", "encoding", "window", "stride", *MODEL_FLAGS],
}
for flag in ("chat-format", "tool-format"):
    FLAGS["complete"].remove(flag)
    FLAGS["perplexity"].remove(flag)
FLAGS["perplexity"].remove("max-seq-len")
FLAGS["perplexity"].remove("draft")


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


# ---- where else options may stand

SIZES = Options(
    [Option("port", "", int, 8000), Option("api_key", "", list[str] | None), Option("quiet", "", bool, False)]
)


def chosen(*arguments: object) -> dict:
    """What a command gets of these arguments, its environment and its file."""
    command, given = typer.Typer(add_completion=False), []

    @command.command(context_settings={"auto_envvar_prefix": "LLAMA"})
    @takes(sizes=SIZES)
    def run(config: CONFIG = None, *, sizes: dict) -> None:
        given.append(sizes)

    command([str(argument) for argument in arguments], standalone_mode=False)
    return given[0]


@pytest.fixture
def written(tmp_path):
    def write(text: str):
        (tmp_path / "llama.toml").write_text(text)
        return tmp_path / "llama.toml"

    return write


def test_flags_come_before_the_environment_that_before_a_file_and_that_before_defaults(written, monkeypatch):
    file = written('port = 1\napi-key = ["a", "b"]\nquiet = true\n')
    assert chosen() == {"port": 8000, "quiet": False}
    assert chosen("--config", file) == {"port": 1, "api_key": ["a", "b"], "quiet": True}
    monkeypatch.setenv("LLAMA_PORT", "2")
    monkeypatch.setenv("LLAMA_QUIET", "0")
    assert chosen("--config", file) == {"port": 2, "api_key": ["a", "b"], "quiet": False}
    assert chosen("--port", 3, "--config", file)["port"] == 3
    monkeypatch.setenv("LLAMA_CONFIG", str(file))
    assert chosen()["api_key"] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prt = 1", "sets 'prt', which is no option here: there are api_key, port, quiet"),
        ('config = "x"', "sets 'config', which is no option here"),
        ("port = true", "sets 'port' to True: give one value"),
        ("port = [1]", r"sets 'port' to \[1\]: give one value"),
        ("[port]\na = 1", "sets 'port' to .*: give one value"),
        ("quiet = 1", "sets 'quiet' to 1: give true or false"),
        ('api_key = "a"', "sets 'api_key' to 'a': give a list"),
        ("port =", "llama.toml: Invalid value"),
        ("\xff", "llama.toml: "),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_what_is_there(written, text, message):
    with pytest.raises(typer.BadParameter, match=message):
        chosen("--config", written(text))


def test_a_file_s_value_is_checked_as_a_flag_s_is(written):
    with pytest.raises(typer.BadParameter, match="valid integer"):
        chosen("--config", written('port = "x"'))
