"""Ids are transformers' ids: tokenizers of many families, each made here, beside its AutoTokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.vocabularies import CORPUS, many_texts, pieces_json, plain, train_byte_level, train_sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama.chat import format_dialog
from llama.tokenizer import Tokenizer
from llama.vocabulary.byte_level import DEEPSEEK_CODER_PATTERNS, LLAMA3_PATTERN, QWEN2_PATTERN, TEKKEN_PATTERN

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DIALOG = [
    {"role": "user", "content": " the quick  brown"},
    {"role": "assistant", "content": "hello, world"},
    {"role": "user", "content": "it's 123 4567!\n你好 foo bar"},
]
WORDS = [
    " foo ",
    "foobar",
    "foo",
    "bar",
    "[C]",
    "[C][C]O",
    "你好",
    "你好吗",
    "BAR",
    "a  bar  b",
    " baz",
    "bazbaz baz",
]
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def texts() -> list[str]:
    """300 texts, of which many hold added words."""
    chooser = random.Random(3)
    mixed = ["".join(chooser.choices([*WORDS, "the ", "x", " ", "  ", "\n"], k=6)) for _ in range(100)]
    return [*many_texts(200, seed=12), *mixed]


def save(folder: Path, made: tokenizers.Tokenizer, template: str = CHATML, **config: Any) -> None:
    """A directory as transformers reads it."""
    made.save(str(folder / "tokenizer.json"))
    write_config(folder, template, **config)


def write_config(folder: Path, template: str, **config: Any) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | config
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def pieces(*added: AddedToken) -> tokenizers.Tokenizer:
    made = pieces_json(train_sentencepiece(vocab_size=400))
    made.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    return with_added(made, *added)


def words_of_bytes(*steps: Any, merges_ignored: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE, trained with these pre-tokenizers."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=merges_ignored))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if steps:
        made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def cut(*patterns: str) -> list[Any]:
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def with_added(made: tokenizers.Tokenizer, *added: AddedToken) -> tokenizers.Tokenizer:
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    made.add_tokens(list(added))
    return made


FLAGGED = (
    AddedToken("foo", lstrip=True, normalized=False),
    AddedToken("bar", rstrip=True, normalized=False),
    AddedToken("baz", single_word=True, normalized=False),
    AddedToken("[C]", normalized=True),
    AddedToken("你好", normalized=True),
)


def llama_2(folder: Path, **config: Any) -> None:
    save(folder, pieces(), LLAMA2, tokenizer_class="LlamaTokenizer", **config)


def only_a_model(folder: Path, **config: Any) -> None:
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=400))
    write_config(folder, LLAMA2, tokenizer_class="LlamaTokenizer", **config)


def model_and_added_tokens_json(folder: Path) -> None:
    only_a_model(folder)
    size = Tokenizer(folder / "tokenizer.model").n_words
    write_config(folder, CHATML, tokenizer_class="LlamaTokenizer", legacy=True, eos_token="<|im_end|>")
    tokens = {"<|im_start|>": size, "<|im_end|>": size + 1, "foo": size + 2}
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def model_and_decoder(folder: Path, **config: Any) -> None:
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=400))
    size = Tokenizer(folder / "tokenizer.model").n_words
    flags = {"single_word": False, "normalized": False}
    tokens = {
        "<|im_start|>": {"lstrip": False, "rstrip": True, "special": True},
        "<|im_end|>": {"lstrip": True, "rstrip": True, "special": True},
        "foo": {"lstrip": True, "rstrip": False, "special": False},
        "bar": {"lstrip": False, "rstrip": True, "special": False},
        "baz": {"lstrip": False, "rstrip": False, "special": False, "single_word": True},
    }
    decoder = {str(size + i): {"content": token} | flags | more for i, (token, more) in enumerate(tokens.items())}
    write_config(folder, CHATML, tokenizer_class="LlamaTokenizer", added_tokens_decoder=decoder, **config)


def metaspace(folder: Path, scheme: str, split: bool) -> None:
    made = pieces(AddedToken("foo", normalized=False), AddedToken("bar", lstrip=True, normalized=True))
    made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    save(folder, made)


def unigram(folder: Path) -> None:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    save(folder, with_added(made, *FLAGGED))


def named_only(folder: Path) -> None:
    """Tokens that nothing but tokenizer_config.json has."""
    made = with_added(words_of_bytes())
    save(folder, made, pad_token="<|pad|>", additional_special_tokens=["<|call|>", "<|im_start|>"])


def seen_as(folder: Path) -> None:
    made = with_added(words_of_bytes(*cut(QWEN2_PATTERN)), AddedToken("<think>", normalized=False), *FLAGGED)
    made.normalizer = normalizers.NFC()
    save(folder, made, CHATML + "{{ '<think>' }}")


FAMILIES: dict[str, Callable[[Path], None]] = {
    "llama 2": lambda folder: llama_2(folder, legacy=True),
    "llama 2, not legacy": lambda folder: llama_2(folder, legacy=False),
    "llama 2 that does not say": llama_2,
    "llama 2 without a space": lambda folder: llama_2(folder, add_prefix_space=False),
    "prepending normalizer": lambda folder: save(folder, pieces(*FLAGGED)),
    "tokenizer.model, legacy": lambda folder: only_a_model(folder, legacy=True),
    "tokenizer.model, not legacy": lambda folder: only_a_model(folder, legacy=False),
    "tokenizer.model and added_tokens.json": model_and_added_tokens_json,
    "tokenizer.model and added_tokens_decoder": lambda folder: model_and_decoder(folder, legacy=False),
    "tokenizer.model, legacy, and added_tokens_decoder": lambda folder: model_and_decoder(folder, legacy=True),
    "metaspace first": lambda folder: metaspace(folder, "first", split=False),
    "metaspace always, split": lambda folder: metaspace(folder, "always", split=True),
    "metaspace never": lambda folder: metaspace(folder, "never", split=False),
    "unigram": unigram,
    "gpt-2": lambda folder: save(folder, with_added(words_of_bytes(), *FLAGGED)),
    "smollm2": lambda folder: save(folder, with_added(train_byte_level(), *FLAGGED)),
    "a space in front": lambda folder: save(
        folder, with_added(words_of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)), *FLAGGED)
    ),
    "llama 3": lambda folder: save(
        folder, with_added(words_of_bytes(*cut(LLAMA3_PATTERN), merges_ignored=True), *FLAGGED)
    ),
    "tekken": lambda folder: save(
        folder, with_added(words_of_bytes(*cut(TEKKEN_PATTERN), merges_ignored=True), *FLAGGED)
    ),
    "qwen 2": seen_as,
    "deepseek": lambda folder: save(
        folder,
        with_added(words_of_bytes(*cut(*DEEPSEEK_CODER_PATTERNS)), *FLAGGED),
        tokenizer_class="LlamaTokenizerFast",
    ),
    "named in tokenizer_config.json": named_only,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer and ours."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("family")
    FAMILIES[request.param](folder)
    name = "tokenizer.json" if (folder / "tokenizer.json").exists() else "tokenizer.model"
    return AutoTokenizer.from_pretrained(str(folder)), Tokenizer(folder / name)


def special_tokens(oracle: Any) -> set[str]:
    return {token.content for token in oracle.added_tokens_decoder.values() if token.special}


def test_text_gets_transformers_ids(family):
    oracle, ours = family
    # Names that only transformers looks up in text: those of markup, and what a Unigram model holds under its name.
    skipped = {"<unk>"} | (ours.special_tokens.keys() - special_tokens(oracle))
    if isinstance(oracle._tokenizer.model, models.Unigram):
        skipped |= special_tokens(oracle)
    for text in texts():
        if any(name in text for name in skipped):
            continue
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # As here, what a person types becomes no control token there.
        expected = oracle(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert plain(ours, text) == expected


def test_dialogs_get_transformers_ids(family):
    oracle, ours = family
    expected = oracle.apply_chat_template(DIALOG, tokenize=True, return_dict=False)
    assert format_dialog(DIALOG, ours).tokens == list(expected)


def test_the_same_tokens_exist_and_control(family):
    oracle, ours = family
    assert ours.n_words == len(oracle)
    assert (ours.bos_id, ours.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert ours.eos_id in ours.stop_ids
    special = special_tokens(oracle) - {"<unk>"}
    assert special <= ours.special_tokens.keys()
    for token in special:
        assert ours.special_tokens[token] == oracle.convert_tokens_to_ids(token)
