"""Files that hold no vocabulary, damaged ones, and what is said of them."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.vocabularies import (
    beside,
    plain,
    stream,
    tiktoken_lines,
    train_byte_level,
    write_gguf,
)

from llama.tokenizer import KINDS, Tokenizer, TokenizerError
from llama.vocabulary.byte_level import PRE_TOKENIZERS

# --- errors ---------------------------------------------------------------------------------------------------------


def one_line(error: BaseException, *parts: object) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def refuse(path: Path, *parts: str) -> None:
    """Opening `path` must fail with one line that names it and holds these parts."""
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(path)
    one_line(caught.value, path, *parts)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Tokenizer(tmp_path / "nothing")
    one_line(caught.value, tmp_path / "nothing", "give a tokenizer.model, tokenizer.json or .gguf file")
    refuse(tmp_path, "is a directory")


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 300, b"PK\x03\x04", b"plain text\n", b"\n\n\n", b"GGML" + bytes(60)]
)
def test_a_foreign_file_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    refuse(tmp_path / "tokenizer.model")


def test_what_no_kind_begins_with_is_refused_with_the_kinds_that_are_known(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04")
    refuse(tmp_path / "x", "no vocabulary of a known kind", *KINDS, r"b'PK\x03\x04'")


def test_the_name_of_a_file_does_not_matter(files, tiny, tmp_path):
    for name, path in files.items():
        for other in ("tokenizer.model", "tokenizer.json", "x.gguf"):
            (tmp_path / other).write_bytes(path.read_bytes())
            copy = Tokenizer(tmp_path / other)
            assert (copy.kind, copy.n_words) == (tiny[name].kind, tiny[name].n_words)
    kinds = {name: tokenizer.kind for name, tokenizer in tiny.items()}
    assert [kinds[name] for name in ("nfkc", "tiktoken", "pieces json", "gguf of nfkc")] == [
        *("sentencepiece", "tiktoken", "tokenizer.json", "gguf")
    ]


def json_error(tmp_path: Path, change: Callable[[dict], object], *parts: str) -> None:
    spec = json.loads(train_byte_level().to_str())
    change(spec)
    (tmp_path / "x").write_text(json.dumps(spec))
    refuse(tmp_path / "x", *parts)


def test_json_that_is_no_tokenizer_json_is_refused(tmp_path):
    json_error(tmp_path, lambda spec: spec.pop("model"), "JSON, but no tokenizer.json")
    json_error(
        tmp_path,
        lambda spec: spec["model"].pop("merges"),
        "a model of type BPE is not known; BPE and Unigram",
    )
    json_error(tmp_path, lambda spec: spec.pop("decoder"), "the decoder [] is not known")
    json_error(
        tmp_path,
        lambda spec: spec.update(decoder={"type": "WordPiece"}),
        "decoder ['WordPiece'] is not known",
    )
    replacing = {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}
    json_error(tmp_path, lambda spec: spec.update(decoder=replacing), "decoder ['Replace'] is not known")
    json_error(tmp_path, lambda spec: spec["model"]["vocab"].update(x=2**31), "id is not a number from 0 to")
    json_error(tmp_path, lambda spec: spec["model"]["vocab"].update(x="1"), "id is not a number from 0 to")
    for merges in (["a zz"], ["a b c"], [["a"]], [7]):
        json_error(tmp_path, lambda spec, merges=merges: spec["model"].update(merges=merges), "a damaged vocabulary")
    (tmp_path / "x").write_text('{"model": ')
    refuse(tmp_path / "x", "is not JSON")
    (tmp_path / "x").write_text('{"model": ' + "[" * 100_000)
    refuse(tmp_path / "x", "is not JSON")


def test_a_damaged_file_beside_a_tokenizer_is_named(files, tmp_path):
    with pytest.raises(TokenizerError, match=r"generation_config\.json is not JSON"):
        beside(files["byte-level json"], tmp_path, generation_config__json="{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not a JSON object"):
        beside(files["byte-level json"], tmp_path, generation_config__json="{}", tokenizer_config__json="[]")


def test_a_gguf_vocabulary_that_is_not_known_is_refused(tiny, tmp_path):
    fields = tiny["byte-level json"].gguf_metadata()
    cases = [
        ({"model": "t5"}, ['tokenizer.ggml.model is \'t5\'; "llama" and "gpt2" are known']),
        ({"pre": "kimi-k2"}, ["the pre-tokenizer 'kimi-k2' is not known; known are", *PRE_TOKENIZERS]),
        ({"token_type": [1, 2, 3]}, ["the lists of tokens, types and scores differ in length"]),
        ({"tokens": [1] * len(fields["tokenizer.ggml.tokens"])}, ["hold values of a wrong type"]),
    ]
    for changes, parts in cases:
        changed = fields | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        refuse(write_gguf(tmp_path / "x", changed), *parts)
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    refuse(tmp_path / "x", "GGUF version 1 is not supported: versions 2 and 3 are read")
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60))
    refuse(tmp_path / "x", "1 metadata entries are announced, but only 8 bytes are left")
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99))
    refuse(tmp_path / "x", "the metadata type 99 is not known")


def test_a_tiktoken_file_must_rank_every_byte_once(tmp_path):
    lines = tiktoken_lines().splitlines(keepends=True)
    for broken in (
        lines[1:],
        lines[:-2] + lines[-1:],
        [*lines, b"AA== 999\n"],
        [lines[0], b"AQ== 1 2\n", *lines[2:]],
    ):
        (tmp_path / "x").write_bytes(b"".join(broken))
        refuse(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"".join(lines[1:]))
    refuse(tmp_path / "x", "the ranks are not 0, 1, 2, ... once each, or a single byte has none")


def test_what_gguf_cannot_say_is_not_written(tiny, tmp_path):
    with pytest.raises(TokenizerError, match="not BPE"):
        tiny["unigram"].vocabulary()
    for part, value in (
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("normalizer", {"type": "Lowercase"}),
    ):
        spec = json.loads(train_byte_level().to_str()) | {part: value}
        (tmp_path / "x").write_text(json.dumps(spec))
        with pytest.raises(TokenizerError, match="GGUF cannot say how it tokenizes") as caught:
            Tokenizer(tmp_path / "x").vocabulary()
        one_line(caught.value, tmp_path / "x")


def test_a_panic_of_a_compiled_library_becomes_an_error_and_an_interrupt_does_not(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(error: BaseException) -> Callable[[str], None]:
        def from_str(text: str) -> None:
            raise error

        return from_str

    train_byte_level().save(str(tmp_path / "x"))
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", panic(PanicException("index\nout of range")))
    refuse(tmp_path / "x", "a damaged vocabulary (PanicException: index out of range)")
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", panic(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(tmp_path / "x")


# --- damaged files --------------------------------------------------------------------------------------------------


def damage(data: bytes, chooser: random.Random) -> bytes:
    """Cut the file off, or turn a few bits, most of them near its beginning."""
    if chooser.random() < 0.2:
        return data[: chooser.randrange(len(data))]
    damaged = bytearray(data)
    for _ in range(chooser.choice([1, 1, 2, 4])):
        place = chooser.randrange(min(len(data), chooser.choice([64, 600, len(data)])))
        damaged[place] ^= 1 << chooser.randrange(8)
    return bytes(damaged)


def survive(path: Path, count: int) -> None:
    """Open `count` damaged copies: each is refused in one line, or it works."""
    chooser, data, copy = random.Random(11), path.read_bytes(), path.with_name("damaged")
    outcomes = {"refused": 0, "opened": 0}
    for _ in range(count):
        copy.write_bytes(damage(data, chooser))
        try:
            tokenizer = Tokenizer(copy)
        except TokenizerError as error:
            one_line(error, copy)
            outcomes["refused"] += 1
            continue
        outcomes["opened"] += 1
        ids = plain(tokenizer, "the 123 你好 😀 <|im_start|></s>    it's")
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
        tokenizer.decode(list(range(tokenizer.n_words)))
    assert all(outcomes.values())


SOURCES = [
    "sentencepiece",
    "nfkc",
    "tiktoken",
    "byte-level json",
    "gguf of sentencepiece",
    "gguf of byte-level json",
]


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_file_is_refused_in_one_line_or_works(name, files):
    survive(files[name], 150)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SOURCES)
def test_twenty_thousand_damaged_files_are_refused_or_work(name, files):
    survive(files[name], 20_000)


@pytest.mark.parametrize("place", ["vocabulary", "added tokens"])
def test_a_token_far_beyond_the_others_is_refused_before_all_ids_between_get_names(tmp_path, place):
    spec = json.loads(train_byte_level().to_str())
    if place == "vocabulary":
        spec["model"]["vocab"]["far"] = 3_000_000
    else:
        spec["added_tokens"].append({"id": 3_000_000, "content": "<far>", "special": True})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    refuse(path, "a token's id is not a number from 0 to")
