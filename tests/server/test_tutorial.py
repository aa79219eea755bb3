"""The tutorials' command and its client, as somebody has them who followed one."""

import json
import os
import re
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from support.adapter_files import save_adapter
from support.checkpoints import write_hf, write_sentencepiece
from support.meta_files import save_meta, save_tokenizer
from support.ranks import ROOT
from support.server import Running
from support.tiny import tiny_args, tiny_weights
from support.tutorial import CLIENT_FIELDS
from typer.testing import CliRunner

from llama import Llama
from llama import __main__ as command_line
from llama.checkpoint import open_checkpoint, save_low_bit
from llama.quantization import resolve_format
from llama.server import run
from llama.server.settings import ServerSettings
from llama.server.tutorial import TutorialOptions, chosen_adapters, tutorial_load


def test_the_tutorials_client_gets_its_answer(running: Running):
    """The body of accelerate_client.py, field for field."""
    history = [
        {"role": "Human", "content": "你好"},
        {"role": "Assitant", "content": "你好,我是LLama2中文大语言模型"},
        {"role": "Human", "content": "推荐几部电影"},
    ]
    payload = {"system_prompt": "", "history": history, **CLIENT_FIELDS}
    status, answer = running.post("/generate", payload)
    assert (status, answer["status"]) == (200, 200)
    assert isinstance(answer["response"], str)
    assert json.dumps(answer, ensure_ascii=False, indent=2)
    status, answer = running.post("/generate", {**payload, "use_beam_search": True})
    assert (status, answer["status"]) == (400, 400)


@pytest.mark.parametrize(
    ("given", "machine", "load"),
    [
        (dict(model_path="m"), {}, dict(quantization="sym_int8")),
        (dict(model_path="m", infer_dtype="int4"), {}, dict(quantization="sym_int4")),
        (dict(model_path="m", infer_dtype="int4"), dict(is_low_bit=True), {}),
        (dict(model_path="m", infer_dtype="float16"), {}, {}),
        (dict(model_path="m", infer_dtype="float16"), dict(has_gpu=True), dict(dtype="fp16")),
        (dict(gpus="0,1"), {}, dict(device="cpu")),
        (dict(gpus="0,1"), dict(has_gpu=True), dict(device="cuda")),
        (dict(model_source="llama2_chinese"), {}, dict(chat_format="atom")),
        (dict(model_source="llama2_meta"), {}, dict(chat_format="llama2")),
        (dict(model_source="llama3_meta"), {}, dict(chat_format="llama3")),
    ],
)
def test_the_tutorials_options_are_some_of_ours(given, machine, load):
    assert TutorialOptions(**given).load(**{"has_gpu": False, "is_low_bit": False, **machine}) == load


def test_graphics_cards_are_those_that_were_named():
    options = TutorialOptions(gpus="0,1")
    assert options.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert TutorialOptions().environment == {}
    assert "runs on the processor" in options.warnings(has_gpu=False, num_ranks=1)[0]
    assert "torchrun --nproc_per_node 2" in options.warnings(has_gpu=True, num_ranks=1)[0]
    assert options.warnings(has_gpu=True, num_ranks=2) == []
    assert TutorialOptions(model_path="m").warnings(has_gpu=False, num_ranks=1) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(infer_dtype="int3"), r"^--infer_dtype is 'int3': give int4, int8, float16$"),
        (dict(model_source="x"), r"^--model_source is 'x': give llama2_chinese, llama2_meta, llama3_meta$"),
        (dict(gpus="all"), r"^--gpus is 'all': give numbers of graphics cards, as 0 or 0,1$"),
    ],
)
def test_what_the_tutorials_do_not_have_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TutorialOptions(**given)


def test_an_adapter_with_a_name_stands_beside_the_model_and_any_other_is_merged(tmp_path):
    a = save_adapter(tmp_path / "loras" / "a", 1)
    b = save_adapter(tmp_path / "b=0.5", 1)
    given = [str(a), f"{a}=0.5", f"x={a}", f"y={a}=0.5", str(b), "a", "a=0.5", "z=a", "w=a=2", "missing", "v=missing"]
    merged, beside = chosen_adapters(given, tmp_path / "loras")
    assert merged == [str(a), f"{a}=0.5", str(b), str(a), f"{a}=0.5", "missing", "v=missing"]
    assert beside == {"x": str(a), "y": f"{a}=0.5", "z": str(a), "w": f"{a}=2.0"}
    assert chosen_adapters(["a"], None) == (["a"], {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tutorial")
    save_tokenizer(directory / "tokenizer.model")
    args = tiny_args(vocab_size=400, multiple_of=64)
    return save_meta(directory / "model", args, tiny_weights(args))


def test_a_low_bit_checkpoint_is_served_as_it_is(checkpoint, tmp_path):
    asked = TutorialOptions(str(checkpoint), infer_dtype="int4")
    assert tutorial_load(asked) == {"quantization": "sym_int4"}
    save_low_bit(open_checkpoint(checkpoint), tmp_path / "low", resolve_format("nf4"))
    assert tutorial_load(TutorialOptions(str(tmp_path / "low"), infer_dtype="int4")) == {}


def test_the_command_listens_where_the_client_looks(checkpoint, monkeypatch):
    started = []
    monkeypatch.setattr(run, "run_server", lambda build, settings: started.append((build(), settings)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    words = f"serve --model_path {checkpoint} --gpus 0 --infer_dtype int8 --model_source llama2_chinese".split()
    for more in ([], ["--port", "8000"]):
        CliRunner().invoke(command_line.app, words + more, catch_exceptions=False)
    (llm, settings), (_, other) = started
    assert (settings.port, other.port, settings.host) == (8001, 8000, "127.0.0.1")
    assert (llm.quantization, llm.chat_format.name) == ("sym_int8", "atom")
    assert str(llm.checkpoint.path) == str(checkpoint)


@pytest.fixture
def webui(tmp_path) -> Path:
    """A folder as text-generation-webui's: a model of 400 tokens, and an adapter with a vocabulary of 600."""
    args = tiny_args(vocab_size=400, multiple_of=64)
    write_hf(tmp_path / "models" / "llama-7b-hf", args, tiny_weights(args))
    write_hf(tmp_path / "models" / "other", args, tiny_weights(args, 1))
    for name in ("llama-7b-hf", "other"):
        write_sentencepiece(tmp_path / "models" / name / "tokenizer.model", 400)
    ends = ("model.embed_tokens", "lm_head")
    whole = {f"base_model.model.{name}.weight": torch.randn(600, args.dim) for name in ends}
    save_adapter(tmp_path / "loras" / "Llama2-7b", 1, whole)
    write_sentencepiece(tmp_path / "loras" / "Llama2-7b" / "tokenizer.model", 600)
    save_adapter(tmp_path / "loras" / "small", 2)
    return tmp_path


def test_the_tutorials_web_page_is_served_by_its_own_command(webui):
    command = f"{sys.executable} -m llama serve --model llama-7b-hf --lora Llama2-7b --cpu --port 0 --quiet".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LLAMA_ADMIN_KEY": "boss"}
    server = subprocess.Popen(command, cwd=webui, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        told = ""
        while "Ctrl-C stops)" not in told:
            line = server.stderr.readline()
            assert line, told
            told += line
        [name, port] = re.search(r"Serving (\S+) at http://127\.0\.0\.1:(\d+)", told).groups()
        assert name == "llama-7b-hf"

        def ask(method: str, path: str, body: object = None) -> object:
            connection = HTTPConnection("127.0.0.1", int(port), timeout=60)
            headers = {"content-type": "application/json", "x-api-key": "boss"}
            connection.request(method, path, body and json.dumps(body), headers)
            return json.loads(connection.getresponse().read())

        assert ask("GET", "/v1/models/llama-7b-hf")["meta"]["n_vocab"] == 600
        text = "".join(map(chr, range(0x4E00, 0x4E08)))
        assert (
            ask("POST", "/generate", {"history": [{"role": "Human", "content": text}], "max_new_tokens": 4})["status"]
            == 200
        )
        assert ask("GET", "/v1/internal/model/list") == {"model_names": ["llama-7b-hf", "other"]}
        assert ask("GET", "/v1/internal/lora/list") == {"lora_names": ["Llama2-7b", "small"]}
        assert ask("POST", "/v1/internal/model/load", {"model_name": "other"}) == "OK"
        assert ask("POST", "/v1/internal/lora/load", {"lora_names": ["small"]}) == "OK"
        assert ask("GET", "/v1/internal/model/info")["lora_names"] == ["small"]
        assert ask("GET", "/v1/models/other")["meta"]["n_vocab"] == 400
        refused = ask("POST", "/v1/internal/lora/load", {"lora_names": ["Llama2-7b"]})
        assert "merge it" in refused["error"]["message"]
        assert ask("POST", "/v1/internal/model/load", {"model_name": "other", "args": {"lora": ["Llama2-7b"]}}) == "OK"
        assert ask("GET", "/v1/models/other")["meta"]["n_vocab"] == 600
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0


def started(monkeypatch, folder: Path, words: str) -> tuple[Llama, ServerSettings]:
    """What a command would serve, run in a folder."""
    found = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(run, "run_server", lambda build, settings: found.append((build(), settings)))
    CliRunner().invoke(command_line.app, f"serve {words}".split(), catch_exceptions=False)
    return found[0]


def test_adapters_of_the_folder_are_merged_or_stand_beside_the_model(webui, monkeypatch):
    llm, settings = started(monkeypatch, webui, "--model other --lora Llama2-7b --lora x=small=0.5 --cpu")
    assert (llm.model.vocab_size, llm.adapters) == (600, ["x"])
    assert (settings.model_dir, settings.lora_dir) == (Path("models"), Path("loras"))
    llm, settings = started(monkeypatch, webui, "models/other --lora x=loras/small --device cpu")
    assert (llm.adapters, settings.model_dir, settings.lora_dir) == (["x"], None, None)
    llm, settings = started(monkeypatch, webui / "models", "--model other --lora ../loras/small")
    assert (llm.adapters, settings.model_dir) == ([], None)


def test_two_models_are_a_wrong_call(llama):
    assert llama("serve", "one", "--model", "two")[::2] == (
        2,
        "llama: MODEL is one and --model two: give one of them\n",
    )
