"""Text and JSON, and what is said of files that are something else."""

import pytest

from llama.checkpoint import CheckpointError, open_checkpoint
from llama.files.json import read_json
from llama.files.mapped import open_file
from llama.files.text import read_text
from llama.tokenizer import Tokenizer, TokenizerError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 4976698672\n"


def test_a_text_in_another_encoding_names_the_file_the_byte_and_the_encoding(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("Straße".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"t\.txt: byte 4 is 0xdf, which is not utf-8: invalid"):
        read_text(file)
    assert read_text(file, "latin-1") == "Straße"
    with pytest.raises(CheckpointError, match="unknown encoding: klingon"):
        read_text(file, "klingon")


def test_json_in_another_encoding_names_the_file_and_the_byte(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xdf"}')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: 'utf-8' .*0xdf in position 7"):
        read_json(tmp_path / "config.json")


def test_a_git_lfs_pointer_says_what_it_is_and_what_to_run(tmp_path):
    message = "is a git-lfs pointer and not the file itself; fetch it with: git lfs"
    for name in ("model.safetensors", "pytorch_model.bin", "x.gguf", "config.json"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=message):
            open_file(tmp_path / name)
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: is a git-lfs pointer"):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"x\.gguf: is a git-lfs pointer"):
        open_checkpoint(tmp_path / "x.gguf")


def test_an_adapters_directory_says_that_it_is_one_and_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds an adapter \(LoRA\) of 'org/base' and no model: merge it"):
        open_checkpoint(tmp_path)
