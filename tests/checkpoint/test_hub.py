import os
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import assert_equal, sample, state, write_gguf, write_hf, write_meta

from llama.checkpoint import CheckpointError, adapters, open_checkpoint, resolve

pytest.importorskip("huggingface_hub")


def test_a_name_is_downloaded_and_opened(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights, 3)
    path = hub.fetch()
    assert_equal(state(path), weights)
    assert open_checkpoint(path).format == "hf"


@pytest.mark.parametrize("kind", ["meta", "gguf", "bin"])
def test_other_formats_are_downloaded_too(hub, kind):
    args, weights = sample()
    writers = {
        "meta": lambda: write_meta(hub.folder, args, weights, 2),
        "gguf": lambda: write_gguf(hub.folder / "m.gguf", args, weights),
        "bin": lambda: write_hf(hub.folder, args, weights, binary=True),
    }
    writers[kind]()
    assert_equal(state(hub.fetch()), weights)


def test_only_settings_and_one_kind_of_weights_are_fetched(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights)
    write_hf(hub.folder, args, weights, binary=True)
    write_meta(hub.folder / "original", args, weights)
    for name in ("modeling_evil.py", "README.md", "model.onnx"):
        (hub.folder / name).write_text("x")
    path = hub.fetch()
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert not [request for request in hub.requests if "evil" in request or "original" in request]


def test_only_one_set_of_weights_is_fetched(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights, 2)
    write_hf(hub.folder, args, weights, 2, binary=True)
    for name in ("consolidated.safetensors", "params.json", "training_args.bin", "q.gguf"):
        (hub.folder / name).write_text("x")
    names = {file.name for file in hub.fetch().iterdir()}
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert names == shards | {"model.safetensors.index.json", "config.json", "params.json"}


def quantizations(hub):
    args, weights = sample()
    for name in ("a.Q4_K_M.gguf", "a.Q4_K_S.gguf", "a.Q8_0.gguf"):
        write_gguf(hub.folder / name, args, weights)
    (hub.folder / "config.json").write_text('{"model_type": "llama"}')
    return weights


@pytest.mark.parametrize("name", ["org/name:Q8_0", "org/name:q8_0", "org/name/a.Q8_0.gguf"])
def test_one_of_several_gguf_files_is_named_and_fetched_alone(hub, name):
    weights = quantizations(hub)
    path = hub.fetch(name)
    assert [file.name for file in path.parent.iterdir()] == ["a.Q8_0.gguf"]
    assert_equal(state(path), weights)
    hub.close()
    assert hub.fetch(name) == hub.fetch() == path  # nothing else is in the cache


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name", "3 GGUF files fit; name one, as org/name:Q4_K_M or .*: a.Q4_K_M, a.Q4_K_S, a.Q8_0"),
        ("org/name:Q4_K", "no such file there, but 3 GGUF files; name one"),
        ("org/name/b.gguf", "no such file there, but 3 GGUF files; name one"),
    ],
)
def test_a_name_that_fits_none_or_several_gguf_files_lists_them_and_fetches_none(hub, name, message):
    quantizations(hub)
    with pytest.raises(CheckpointError, match=message):
        hub.fetch(name)
    assert not [request for request in hub.requests if "gguf" in request]


def test_files_in_folders_are_found_and_a_split_one_is_fetched_whole(hub):
    args, weights = sample()
    write_gguf(hub.folder / "Q8_0" / "a-Q8_0-00001-of-00002.gguf", args, weights)
    (hub.folder / "Q8_0" / "a-Q8_0-00002-of-00002.gguf").write_bytes(b"x")
    write_gguf(hub.folder / "BF16" / "a-BF16.gguf", args, weights)
    path = hub.fetch("org/name:Q8_0")
    assert path.name == "a-Q8_0-00001-of-00002.gguf"
    assert len(list(path.parent.iterdir())) == 2
    assert_equal(state(hub.fetch("org/name/BF16/a-BF16.gguf")), weights)


def test_a_folder_of_a_repository_can_be_named(hub):
    args, weights = sample()
    write_meta(hub.folder / "original", args, weights)
    write_hf(hub.folder, args, {name: weight + 1 for name, weight in weights.items()})
    path = hub.fetch("org/name:original")
    assert_equal(state(path), weights)
    assert not (path.parent / "model.safetensors").exists()


def test_of_a_repository_with_an_adapter_beside_a_model_each_is_fetched_alone(hub, tmp_path, monkeypatch):
    args, weights = sample()
    write_hf(hub.folder, args, weights)
    module = "base_model.model.model.layers.0.self_attn.v_proj"
    parts = {"lora_A": torch.ones(2, args.dim), "lora_B": torch.ones(32, 2)}
    save_file({f"{module}.{part}.weight": one for part, one in parts.items()}, hub.folder / "adapter_model.safetensors")
    (hub.folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    (hub.folder / "adapter_model.bin").write_text("x")
    place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr(adapters, "resolve", partial(resolve, **place))
    adapter = adapters.open_weighted("org/name=0.5")
    assert adapter.low_rank["layers.0.attention.wv"].scale == 4 / 2 * 0.5
    fetched = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    assert sorted(file.name for file in adapter.path.iterdir()) == fetched
    assert (hub.fetch() / "model.safetensors").is_file()
    hub.close()
    assert adapters.open_adapter("org/name").path == adapter.path


def test_a_download_is_used_again_without_the_network(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights)
    path = hub.fetch()
    hub.close()
    assert hub.fetch() == path
    assert_equal(state(path), weights)


def test_what_the_hub_does_not_know_or_cannot_give_is_one_line(hub):
    with pytest.raises(FileNotFoundError, match="org/other: no such directory here, and the hub does not") as error:
        hub.fetch("org/other")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="org/name: the hub has it, but with no weights in a known format"):
        hub.fetch()
    hub.close()
    with pytest.raises(FileNotFoundError, match="org/name: no such directory here, and the hub does not") as error:
        hub.fetch()
    assert "\n" not in str(error.value)


def test_without_the_package_the_error_is_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        resolve("org/name")


def test_a_path_that_exists_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(resolve("org/name")) == os.path.join("org", "name")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["/absent/model", "./org/name", "~/model", "model.gguf", "a/b/c", "../x", "org/"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # beside which there is no x
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="no such file or directory; give"):
        resolve(name)
