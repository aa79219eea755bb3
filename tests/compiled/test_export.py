"""Exported models: a directory with a checkpoint, its package, and the limits that it was made for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import sample, state, write_hf, write_sentencepiece

from llama import Llama, SamplingParams
from llama.checkpoint import CheckpointError, open_checkpoint
from llama.compiled import MANIFEST, PACKAGE
from llama.compiled.cache import cache_folder
from llama.compiled.program import CompiledStep
from llama.export import export_model

pytestmark = pytest.mark.timeout(1800)  # one of them waits for g++, which may have to share the processor
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def build(path: Path, **options) -> Llama:
    return Llama.build(path, **{"device": "cpu", "kv_cache_memory": 1 << 22} | options)


@pytest.fixture
def exported(made, tmp_path) -> Path:
    limits = export_model(
        made.checkpoint, tmp_path / "exported", batch_size=2, sequence_length=48, dtype="fp32", num_cores=1
    )
    assert (limits.batch_size, limits.sequence_length, limits.dtype) == (2, 48, "float32")
    return tmp_path / "exported"


def test_an_export_holds_a_whole_checkpoint(exported, made):
    names = {file.name for file in exported.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.model", MANIFEST, PACKAGE}
    assert state(exported).keys() == state(made.checkpoint).keys()
    said = json.loads((exported / MANIFEST).read_text())
    assert said["limits"] == {
        "batch_size": 2,
        "sequence_length": 48,
        "num_cores": 1,
        "dtype": "float32",
        "kv_dtype": "auto",
    }
    assert said["made_with"]["torch"] == torch.__version__
    assert said["checkpoint"] == open_checkpoint(made.checkpoint).digest


def test_batch_and_length_become_the_engines_limits(exported, made):
    llm = build(exported)
    assert isinstance(llm.engine.runner.program, CompiledStep)
    assert llm.max_seq_len == 48
    with pytest.raises(ValueError, match="48"):
        llm.complete([[5] * 60], GREEDY)
    most, step = 0, llm.engine.step

    def watched():
        nonlocal most
        events = step()
        most = max(most, llm.engine.stats().num_running)
        return events

    llm.engine.step = watched
    prompts = [[5, 6, 7 + number] for number in range(5)]
    found = [c.tokens for c in llm.complete(prompts, GREEDY)]  # a longer list waits, and nothing is filled up
    assert most == 2
    assert found == [c.tokens for c in made.build(compile=False).complete(prompts, GREEDY)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 64}, "max_seq_len is 64, but .*exported was exported for 48"),
        ({"max_batch_size": 3}, "max_batch_size is 3, but .*exported was exported for 2"),
        ({"dtype": "bf16"}, "dtype is bf16, but .*exported was exported with float32"),
        ({"kv_dtype": "int8"}, "kv_dtype is int8, but .*exported was exported with auto"),
        ({"deterministic": True}, "does not run compiled: deterministic=True"),
    ],
)
def test_more_than_it_was_exported_for_is_refused(exported, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(exported, **options)
    assert "\n" not in str(error.value)


def test_less_is_possible(exported):
    llm = build(exported, max_seq_len=32, max_batch_size=1)
    assert (llm.max_seq_len, llm.engine.scheduler.max_running) == (32, 1)


def test_native_code_that_somebody_else_compiled_runs_only_where_one_trusts_it(exported, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of somebody else"))
    with pytest.raises(ValueError, match=r"native code that was not compiled by you .*--trust-compiled") as error:
        build(exported)
    assert "\n" not in str(error.value)
    llm = build(exported, compile=False)
    assert llm.engine.runner.program is llm.model
    assert llm.engine.scheduler.max_running == 2
    trusting = build(exported, trust_compiled=True)
    assert isinstance(trusting.engine.runner.program, CompiledStep)
    assert trusting.engine.runner.program.package == exported / PACKAGE
    assert trusting.generate([[5, 6, 7]], 8, temperature=0.0) == llm.generate([[5, 6, 7]], 8, temperature=0.0)


def test_a_package_that_does_not_fit_says_why_in_one_line_and_how_to_go_on(exported, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of somebody else"))
    manifest = json.loads((exported / MANIFEST).read_text())
    manifest["made_with"]["torch"] = "1.0"
    (exported / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"with torch 1.0, and this is .*--compile\) .*--no-compile\) goes") as error:
        build(exported, trust_compiled=True)
    assert "\n" not in str(error.value)


def test_a_package_that_was_exchanged_does_not_run(exported, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of somebody else"))
    (exported / PACKAGE).write_bytes(b"evil")
    with pytest.raises(ValueError, match=r"step\.pt2 is missing, or not the file that"):
        build(exported, trust_compiled=True)


def test_other_weights_beside_a_package_are_refused(exported, tmp_path):
    args, weights = sample(n_layers=1)
    write_hf(exported, args, weights)
    with pytest.raises(CheckpointError, match="its weights are others than those that were exported"):
        build(exported)


def test_a_new_export_takes_the_place_of_an_older_one_and_of_nothing_else(exported, made, tmp_path):
    (exported / "old").write_text("text")
    export_model(made.checkpoint, exported, batch_size=3, dtype="fp32")
    assert not (exported / "old").exists()
    assert build(exported).engine.scheduler.max_running == 3
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(CheckpointError, match="home: holds files that no export wrote"):
        export_model(made.checkpoint, tmp_path / "home")
    for model in (made.checkpoint, exported):
        with pytest.raises(CheckpointError, match="is the model itself"):
            export_model(model, model, dtype="fp32")


def test_a_tokenizer_from_elsewhere_comes_along(made, tmp_path):
    shutil.copytree(made.checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    export_model(tmp_path / "model", tmp_path / "exported", dtype="fp32", tokenizer_path=tmp_path / "tokenizer.model")
    shutil.rmtree(tmp_path / "model")
    assert build(tmp_path / "exported").complete(["hello"], GREEDY)


def test_the_command_exports_and_others_run_it(made, tmp_path, llama, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    options = ["--batch-size", 2, "--sequence-length", 40, "--dtype", "fp32", "--num-cores", 3]
    status, _, told = llama("export", made.checkpoint, tmp_path / "exported", *options)
    assert status == 0
    assert told.endswith(f"Exported to {tmp_path / 'exported'}: 2 x 40 tokens, float32, 3 threads\n")
    complete = ["complete", tmp_path / "exported", "--prompt", "ab", "--temperature", 0, "--max-tokens", 4]
    status, text, _ = llama(*complete, "--device", "cpu")
    assert status == 0
    assert llama(*complete, "--device", "cpu", "--no-compile")[1] == text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of somebody else"))
    status, _, told = llama(*complete)
    assert status == 1
    assert "--trust-compiled" in told
    assert llama(*complete, "--trust-compiled")[:2] == (0, text)


@pytest.mark.slow
def test_an_export_in_a_low_bit_format_runs_from_the_cache_of_who_exported_it(elsewhere, tmp_path):
    args, weights = sample(dim=64, n_heads=4, n_kv_heads=2, hidden_dim=192)
    checkpoint = write_hf(tmp_path / "model", args, weights)
    write_sentencepiece(checkpoint / "tokenizer.model")
    export_model(checkpoint, tmp_path / "exported", quantization="sym_int4", dtype="fp32", sequence_length=64)
    llm = build(tmp_path / "exported")
    assert isinstance(llm.engine.runner.program, CompiledStep)
    assert llm.engine.runner.program.package.parent.parent == cache_folder()
