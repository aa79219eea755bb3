"""What holds for every kind of vocabulary: text stays text, streams are decodings, files say what their tokens are."""

import json

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.vocabularies import (
    MISTRAL,
    MISTRAL_V3,
    NAMES,
    beside,
    many_texts,
    package_file,
    plain,
    stream,
    train_byte_level,
    train_sentencepiece,
    write_gguf,
)

from llama.tokenizer import StreamDecoder, Tokenizer
from llama.vocabulary import TokenType, tokenizer_json
from llama.vocabulary.byte_level import CHAR_OF_BYTE

# --- text never becomes a control token -----------------------------------------------------------------------------


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


# --- streaming ------------------------------------------------------------------------------------------------------


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
                with pytest.raises(ValueError, match=rf"token id {id} is outside .* 0 to {tokenizer.n_words - 1}"):
                    use(id)


def test_decode_takes_one_id(tiny):
    for tokenizer in tiny.values():
        assert tokenizer.decode(5) == tokenizer.decode([5])


# --- long and odd texts ---------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", ["byte-level json", "pieces json"])
def test_a_long_text_is_encoded_where_others_can_run_and_as_a_short_one_is(name, tiny, monkeypatch):
    tokenizer = tiny[name]
    text = "the quick brown fox, " * 200
    expected = plain(tokenizer, text)
    monkeypatch.setattr(tokenizer_json, "LONG_TEXT", len(text) + 1)
    assert plain(tokenizer, text) == expected
    monkeypatch.setattr(tokenizer_json, "LONG_TEXT", 1)
    monkeypatch.setattr(tokenizer.codec, "_model", OnlyBatches(tokenizer.codec._model))
    assert plain(tokenizer, text) == expected


class OnlyBatches:
    """A library's tokenizer without the call that holds the interpreter until it returns."""

    def __init__(self, model):
        self.encode_batch_fast = model.encode_batch_fast


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


# --- what the files say about their tokens --------------------------------------------------------------------------


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


def test_a_tokenizer_json_alone_says_what_it_can(tiny, files, tmp_path):
    pieces, words = tiny["pieces json"], beside(files["byte-level json"], tmp_path)
    assert (pieces.bos_id, pieces.eos_id, pieces.pad_id, pieces.add_bos) == (1, 2, -1, True)
    assert (words.bos_id, words.eos_id, words.add_bos) == (-1, 0, False)
    assert words.stop_ids == {0, 2}
    assert words.special_tokens == {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
    }


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


def test_markup_is_what_the_template_in_use_writes_and_other_added_words_are_text(files, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(files["byte-level json"].read_bytes())
    think = Tokenizer(path).vocabulary().tokens.index("<think>")
    assert think in plain(Tokenizer(path), "<think>")
    for template in ("{{ '<think>' }}", "text <think>", "{% set x = content.split('<think>') %}"):
        tokenizer = Tokenizer(path, template)
        assert tokenizer.chat_template == template
        assert tokenizer.special_tokens["<think>"] == think
        assert think not in plain(tokenizer, "<think>")
        assert tokenizer.encode_pieces([think, "a"])[0] == think
    for template in ("{# <think> #}", "{{ message['<think>'] }}", "{% if role == '<think>' %}{% endif %}"):
        assert think in plain(Tokenizer(path, template), "<think>")
