import shutil

import pytest
from support.checkpoints import assert_equal, sample, state, write_gguf, write_hf, write_meta, write_sentencepiece

from llama.checkpoint import CheckpointError, open_checkpoint, push, save_low_bit

pytest.importorskip("huggingface_hub")


@pytest.fixture
def empty_hub(hub, monkeypatch):
    """A hub where org/name is not taken, and a person whom it knows."""
    shutil.rmtree(hub.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "owner")
    return hub


def write_model(path, **more):
    args, weights = sample(hidden_dim=192)
    write_hf(path, args, weights, **more)
    write_sentencepiece(path / "tokenizer.model")
    return path, weights


def test_what_was_pushed_is_fetched_again(empty_hub, tmp_path):
    path, weights = write_model(tmp_path / "model", files=2)
    assert push(path, "org/name", endpoint=empty_hub.endpoint) == f"{empty_hub.endpoint}/org/name"
    assert_equal(state(empty_hub.fetch()), weights)
    assert open_checkpoint(empty_hub.fetch()).open_tokenizer().n_words == 264


@pytest.mark.parametrize("kind", ["meta", "gguf", "lowbit"])
def test_other_formats_are_pushed_too(empty_hub, tmp_path, kind):
    model, weights = write_model(tmp_path / "model")
    args, _ = sample(hidden_dim=192)
    path = tmp_path / kind
    if kind == "meta":
        write_meta(path, args, weights, 2)
    elif kind == "gguf":
        path = write_gguf(path / "m.gguf", args, weights)
    else:
        save_low_bit(open_checkpoint(model), path, "sym_int4")
    push(path, "org/name", endpoint=empty_hub.endpoint)
    assert_equal(state(empty_hub.fetch()), state(path))


def test_only_what_a_checkpoint_is_made_of_is_sent_and_what_may_be_done_with_it(empty_hub, tmp_path):
    path, _ = write_model(tmp_path / "model")
    for name in ("LICENSE", "README.md", ".env", "notes.txt", "modeling_evil.py", "step.pt2", "optimizer.pt"):
        (path / name).write_text("text")
    (path / "runs").mkdir()
    push(path, "org/name", endpoint=empty_hub.endpoint)
    sent = {file.name for file in empty_hub.folder.iterdir()}
    assert sent == {"config.json", "model.safetensors", "tokenizer.model", "LICENSE", "README.md"}


def test_an_exported_model_is_sent_whole_and_comes_back_by_name_without_its_code(empty_hub, tmp_path):
    path, _ = write_model(tmp_path / "model")
    (path / "step.pt2").write_bytes(b"code")
    (path / "llama_export.json").write_text("{}")
    push(path, "org/name", endpoint=empty_hub.endpoint)
    assert {"step.pt2", "llama_export.json"} <= {file.name for file in empty_hub.folder.iterdir()}
    fetched = {file.name for file in empty_hub.fetch().iterdir()}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.model"}


def test_a_taken_name_is_written_to_only_where_one_says_so(hub, empty_hub, tmp_path):
    path, weights = write_model(tmp_path / "model")
    hub.folder.mkdir()
    (hub.folder / "theirs").write_text("text")
    with pytest.raises(RuntimeError, match="org/name: it is there already: --overwrite puts these files into it"):
        push(path, "org/name", endpoint=hub.endpoint)
    assert [file.name for file in hub.folder.iterdir()] == ["theirs"]
    push(path, "org/name", overwrite=True, endpoint=hub.endpoint)
    assert_equal(state(hub.fetch()), weights)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "org/name: the hub wants to know who you are: set HF_TOKEN, or run hf auth login"),
        ("nobody", "org/name: the hub does not know your token"),
        ("reader", "org/name: the hub does not let you write there"),
    ],
)
def test_who_may_not_write_is_told_so(empty_hub, tmp_path, monkeypatch, token, message):
    path, _ = write_model(tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        push(path, "org/name", endpoint=empty_hub.endpoint)
    assert "\n" not in str(error.value)
    assert not empty_hub.folder.exists()


def test_a_connection_that_breaks_is_one_line_and_what_is_left_is_told(empty_hub, tmp_path):
    path, _ = write_model(tmp_path / "model")
    empty_hub.stand_in.is_full = True
    with pytest.raises(RuntimeError, match="could not be sent") as error:
        push(path, "org/name", endpoint=empty_hub.endpoint)
    assert "\n" not in str(error.value)
    assert "; the repository is there now, and --overwrite tries again" in str(error.value)
    assert list(empty_hub.folder.iterdir()) == []
    with pytest.raises(RuntimeError, match="org/name: could not be sent to the hub") as error:
        push(path, "org/name", endpoint="http://127.0.0.1:1")  # where nobody listens
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/", "/name", "org/na me"])
def test_a_repository_has_a_name_with_its_owners(tmp_path, name):
    with pytest.raises(ValueError, match="a repository is called org/name"):
        push(tmp_path, name)


def test_what_is_no_checkpoint_is_not_sent(tmp_path):
    (tmp_path / "text").write_text("text")
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        push(tmp_path, "org/name")
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        push(tmp_path / "absent", "org/name")


def test_the_command_says_where_it_is(empty_hub, tmp_path, llama, monkeypatch):
    path, _ = write_model(tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", empty_hub.endpoint)
    status, _, told = llama("push", path, "org/name")
    assert status == 0
    assert told.endswith(f"It is at {empty_hub.endpoint}/org/name\n")
    status, _, told = llama("push", path, "org/name")
    assert status == 1
    assert told == "llama: org/name: it is there already: --overwrite puts these files into it\n"
