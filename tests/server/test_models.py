"""What a server tells of its model, and of those of its folder."""

import pytest
from support.checkpoints import sample, write_hf, write_meta, write_sentencepiece
from support.server import serving

from llama import Llama
from llama.checkpoint import model_in, models_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    args, weights = sample()
    for name, write in (("one", write_meta), ("two", write_hf)):
        write(folder / name, args, weights)
        write_sentencepiece(folder / name / "tokenizer.model", args.vocab_size)
    (folder / "notes.txt").write_text("no model")
    (folder / "empty").mkdir()
    return folder


def test_a_folder_s_models_are_found_by_their_content(folder):
    assert models_in(folder) == {"one": folder / "one", "two": folder / "two"}
    assert model_in(folder, "two") == folder / "two"


WRONG = [(None, "which model; give one of one, two"), ("three", "no model is called three")]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_a_model_that_is_not_there_is_answered_with_those_that_are(folder, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        model_in(folder, name)


def test_the_only_model_need_not_be_named(folder, tmp_path):
    (tmp_path / "one").symlink_to(folder / "one")
    assert model_in(tmp_path, None) == tmp_path / "one"


def test_a_folder_s_models_are_listed_and_only_the_served_one_answers(folder):
    with serving(lambda: Llama.build(folder / "one", device="cpu"), model_dir=folder) as running:
        listed = running.get("/v1/models")[1]["data"]
        assert {model["id"]: model["status"]["value"] for model in listed} == {"one": "loaded", "two": "unloaded"}
        assert running.get("/v1/models/two")[1] == listed[1]
        for name, status in (("one", 200), ("default", 200), ("two", 404), (["two"], 400)):
            assert running.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})[0] == status
