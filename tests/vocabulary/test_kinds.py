"""Every kind of vocabulary against the library that owns it, and against itself in another kind of file."""

import os
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from support.vocabularies import (
    CORPUS,
    LLAMA3,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_V3,
    SMOLLM2,
    many_texts,
    package_file,
    plain,
    train_sentencepiece,
    write_gguf,
)
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama.files.gguf import GGUFFile, LazyArray
from llama.tokenizer import Tokenizer, TokenizerError
from llama.vocabulary.byte_level import CHAR_OF_BYTE, PRE_TOKENIZERS

# --- against the libraries that own the formats ---------------------------------------------------------------------


def test_llama_3s_file_gives_the_ids_and_the_text_of_metas_own_tokenizer(llama3):
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer(package_file(*LLAMA3))
    for text in many_texts(1000, seed=1):
        ids = llama3.encode(text, True, True)
        assert ids == meta.encode(text, bos=True, eos=True)
        assert llama3.decode(ids) == meta.decode(ids[1:-1])
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "special_tokens"):
        assert getattr(llama3, name) == getattr(meta, name)
    assert llama3.stop_ids == set(meta.stop_tokens)


def test_llama_3s_published_example_is_kept(llama3):
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == ids
    assert llama3.decode(ids) == "This is a test sentence."


@pytest.mark.parametrize("name", [MISTRAL, MISTRAL_V3], ids=lambda name: name[-1])
def test_a_sentencepiece_model_gives_the_ids_and_the_text_of_sentencepiece(name):
    tokenizer = Tokenizer(package_file(*name))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(package_file(*name)))
    for text in many_texts(1000, seed=2):
        ids = plain(tokenizer, text)
        assert ids == oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids)
    assert tokenizer.encode("a", True, True) == [oracle.bos_id(), *oracle.encode("a"), oracle.eos_id()]
    assert (tokenizer.n_words, tokenizer.pad_id) == (oracle.vocab_size(), -1)
    assert tokenizer.sp_model.serialized_model_proto() == oracle.serialized_model_proto()


def test_a_tokenizer_json_gives_the_ids_and_the_text_of_the_tokenizers_library(llama3, llama3_json):
    tokenizer, oracle = llama3_json, tokenizers.Tokenizer.from_file(str(package_file(*LLAMA3_JSON)))
    oracle.encode_special_tokens = True
    for text in many_texts(1000, seed=3):
        ids = plain(tokenizer, text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids == plain(llama3, text)
        assert tokenizer.decode(ids) == oracle.decode(ids)


def test_the_vocabulary_inside_smollm2_gives_the_ids_of_an_oracle_built_from_it(smollm2):
    fields = gguf.GGUFReader(package_file(*SMOLLM2)).fields
    metadata = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    ours = GGUFFile(package_file(*SMOLLM2)).metadata
    for key in ours:
        value = ours[key].read() if isinstance(ours[key], LazyArray) else ours[key]
        assert value == (metadata[key] if isinstance(value, list) else pytest.approx(metadata[key]))

    ids = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    oracle = tokenizers.Tokenizer(models.BPE(ids, merges))
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    oracle.pre_tokenizer = pre_tokenizers.Sequence(words)
    oracle.decoder = decoders.ByteLevel()
    for text in many_texts(1000, seed=4):
        tokens = plain(smollm2, text)
        assert tokens == oracle.encode(text).ids
        assert smollm2.decode(tokens) == oracle.decode(tokens)


@pytest.mark.slow
def test_the_vocabulary_inside_smollm2_gives_the_ids_that_transformers_gives(smollm2):
    from transformers import AutoTokenizer

    path = package_file(*SMOLLM2)
    oracle = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in many_texts(1000, seed=5):
        # transformers reads this file without its rule for digits, and makes control tokens of text.
        has_number = any(unicodedata.category(character).startswith("N") for character in text)
        if not has_number and not any(token in text for token in smollm2.special_tokens):
            assert plain(smollm2, text) == oracle(text, add_special_tokens=False).input_ids


# --- a GGUF file tokenizes like the file that it was made from ------------------------------------------------------


@pytest.mark.parametrize("name", [MISTRAL, LLAMA3], ids=lambda name: name[0])
def test_a_gguf_written_from_a_real_vocabulary_tokenizes_alike(name, tmp_path):
    source = Tokenizer(package_file(*name))
    copy = Tokenizer(write_gguf(tmp_path / "copy", source.gguf_metadata()))
    for text in [*many_texts(400, seed=6), "a" * 60_000, " " * 60_000, "😀" * 30_000]:
        ids = plain(source, text)
        assert plain(copy, text) == ids
        assert copy.decode(ids) == source.decode(ids)
    for attribute in ("n_words", "bos_id", "eos_id", "pad_id", "add_bos", "special_tokens", "stop_ids"):
        assert getattr(copy, attribute) == getattr(source, attribute)


@pytest.mark.parametrize("name", ["sentencepiece", "nfkc", "tiktoken", "byte-level json", "pieces json"])
def test_a_gguf_written_from_a_tiny_vocabulary_tokenizes_alike(name, tiny):
    source, copy = tiny[name], tiny[f"gguf of {name}"]
    for text in many_texts(300, seed=7):
        ids = plain(source, text)
        assert plain(copy, text) == ids
        if name != "nfkc":  # which has an unknown token: "" in one kind, " ⁇ " in the other
            assert copy.decode(ids) == source.decode(ids)
    for attribute in ("n_words", "bos_id", "eos_id", "pad_id", "add_bos", "special_tokens", "stop_ids"):
        assert getattr(copy, attribute) == getattr(source, attribute)
    assert copy.vocabulary().tokens == source.vocabulary().tokens


def test_a_tokenizer_json_made_from_a_sentencepiece_model_tokenizes_like_it(tiny, tmp_path):
    (tmp_path / "model").write_bytes(train_sentencepiece())
    model = Tokenizer(tmp_path / "model")
    for text in many_texts(300, seed=8):
        ids = plain(model, text)
        assert plain(tiny["pieces json"], text) == ids
        assert tiny["pieces json"].decode(ids) == model.decode(ids)


def test_every_known_pre_tokenizer_cuts_without_losing_text(tiny, tmp_path):
    fields = tiny["byte-level json"].gguf_metadata()
    for name in PRE_TOKENIZERS:
        tokenizer = Tokenizer(write_gguf(tmp_path / name, fields | {"tokenizer.ggml.pre": name}))
        for text in many_texts(80, seed=9):
            assert tokenizer.decode(plain(tokenizer, text)) == text


def test_pre_tokenizers_cut_digits_and_contractions_as_their_models_do(tmp_path):
    """Words that are tokens show where a rule cuts: with every string of two characters a token, pairs stay whole."""
    tokens = [*CHAR_OF_BYTE, "12", "34", "'t", "n'", "Ġ1", "Ġ7", "!!", "ĊĊ"]
    merges = [f"{token[0]} {token[1]}" for token in tokens[256:]]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }
    fields["tokenizer.ggml.token_type"] = [1] * len(tokens)

    def pieces(pre: str, text: str) -> list[str]:
        tokenizer = Tokenizer(write_gguf(tmp_path / pre, fields | {"tokenizer.ggml.pre": pre}))
        return [tokens[id] for id in plain(tokenizer, text)]

    assert pieces("gpt-2", "1234 7") == ["12", "34", "Ġ7"]
    assert pieces("llama-bpe", "1234 7") == ["12", "3", "4", "Ġ", "7"]  # threes, and no space in front
    assert pieces("smollm", "1234 7") == ["1", "2", "3", "4", "Ġ", "7"]
    assert pieces("qwen2", "1234 7") == ["1", "2", "3", "4", "Ġ", "7"]
    assert pieces("falcon", "1234 7") == ["12", "3", "4", "Ġ7"]
    assert pieces("deepseek-coder", "1234\n\n") == ["1", "2", "3", "4", "Ċ", "Ċ"]
    assert pieces("llama-bpe", "n'T n't\n\n") == ["n", "'", "T", "Ġ", "n", "'t", "ĊĊ"]
    assert pieces("default", "n't!!") == ["n", "'", "t", "!!"]  # punctuation first
    assert pieces("midm-2.0", "1234 7") == ["12", "3", "4", "Ġ", "7"]
    assert pieces("deepseek-v3", "1234 n't") == ["12", "3", "4", "Ġ", "n", "'t"]
    assert pieces("deepseek-llm", "1234 7\n\n") == ["12", "34", "Ġ", "7", "Ċ", "Ċ"]
    assert pieces("seed-coder", "1234!!\n\n") == ["1", "2", "3", "4", "!!", "ĊĊ"]
    assert pieces("llama4", "1234 n't") == ["12", "3", "4", "Ġ", "n", "'t"]
    assert pieces("viking", "1234 7!!") == ["1", "2", "3", "4", "Ġ", "7", "!!"]
    assert pieces("superbpe", "1234 7") == ["1", "2", "34", "Ġ", "7"]  # threes from the right
    assert pieces("minerva-7b", "1234 7") == ["1", "2", "3", "4", "Ġ", "7"]
    assert pieces("megrez", "1234 7") == ["1", "2", "3", "4", "Ġ", "7"]
    for pre in ("trillion", "mellum"):
        assert pieces(pre, "1234 7") == ["12", "34", "Ġ7"]


VECTORS = Path(os.environ.get("LLAMA_CPP_MODELS", "/nowhere"))


@pytest.mark.skipif(not VECTORS.is_dir(), reason="LLAMA_CPP_MODELS does not name llama.cpp's folder of vocabularies")
@pytest.mark.parametrize(
    "name",
    [
        *(
            "command-r",
            "deepseek-coder",
            "deepseek-llm",
            "falcon",
            "gpt-2",
            "llama-bpe",
            "llama-spm",
            "mpt",
            "phi-3",
        ),
        *("qwen2", "qwen35", "refact", "starcoder"),
    ],
)
def test_llama_cpps_own_vectors_are_met(name):
    """Vocabularies, texts and ids that llama.cpp is tested with: models/ggml-vocab-* in its source.

    They are in a package too: `pip download --no-deps --no-binary :all: llama-cpp-python`, under vendor/llama.cpp.
    """
    file = VECTORS / f"ggml-vocab-{name}.gguf"
    texts = file.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = file.with_suffix(".gguf.out").read_text().split("\n")
    tokenizer = Tokenizer(file)
    for text, line in zip(texts, lines, strict=True):
        assert plain(tokenizer, text) == [int(id) for id in line.split()]


# --- Unigram --------------------------------------------------------------------------------------------------------


def test_a_unigram_tokenizer_json_tokenizes_like_its_library_and_spells_control_tokens_out(tmp_path):
    oracle = tokenizers.Tokenizer(models.Unigram())
    oracle.pre_tokenizer, oracle.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    oracle.train_from_iterator(CORPUS, trainer)
    oracle.save(str(tmp_path / "x"))
    tokenizer = Tokenizer(tmp_path / "x")
    for text in CORPUS[:3]:
        ids = plain(tokenizer, text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == oracle.decode(ids) == text
    assert {1, 2}.isdisjoint(plain(tokenizer, "<s>the</s>"))
    with pytest.raises(TokenizerError, match="GGUF cannot say how it tokenizes: it is not BPE"):
        tokenizer.vocabulary()
