"""A checkpoint's tokenizer: where it lies, and what of it each format's files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.gguf import Value
from ..files.json import json_bytes
from ..tokenizer import Tokenizer
from ..vocabulary import TokenType, Vocabulary
from ..vocabulary.gguf import as_value
from ..vocabulary.sentencepiece import with_added_pieces, write_proto
from ..vocabulary.tiktoken import SPECIAL, is_ranked, write_ranks
from ..vocabulary.tokenizer_json import write_spec

NAMES = ("tokenizer.model", "tokenizer.json")
HF_NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


def find_tokenizer(path: Path, names: tuple[str, ...] = NAMES) -> Path | None:
    """The tokenizer inside a checkpoint directory, or one directory above it as in Meta's layout."""
    for folder in (path, path.absolute().parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


class TokenizerFiles:
    """The tokenizer at `path`, as the files that each format keeps beside (or inside) its weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer = Tokenizer(str(path))
        self.warnings: list[str] = []
        beside = path.parent / "tokenizer.model"
        self._proto: bytes | None = None
        self._tokens = self.tokenizer.codec.tokens
        if self.tokenizer.sp_model is not None:
            self._proto = with_added_pieces(self.tokenizer.sp_model.serialized_model_proto(), self._tokens)
        elif self.tokenizer.kind == "tokenizer.json" and beside.is_file():
            self._proto = _sentencepiece(beside, self._tokens)

    @property
    def is_sentencepiece(self) -> bool:
        """Whether `for_meta` gives a sentencepiece model, the only kind that Meta's Llama 2 code reads."""
        return self._proto is not None or self.tokenizer.vocabulary().kind == "spm"

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id if self.tokenizer.bos_id >= 0 else None

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.tokenizer.eos_id >= 0 else None

    def for_meta(self) -> dict[str, bytes]:
        """`tokenizer.model`, sentencepiece's or tiktoken's; where neither can say it, Hugging Face's files."""
        config = self._config()
        says_more = {"chat_template", "added_tokens_decoder", "legacy"} & config.keys()
        template = {"tokenizer_config.json": json_bytes(config)} if says_more else {}
        if self.tokenizer.kind == "tiktoken":
            return {"tokenizer.model": self.path.read_bytes()} | template
        if self.is_sentencepiece:
            return {"tokenizer.model": self._proto or self._proto_from_pieces()} | template
        vocabulary = self.tokenizer.vocabulary()
        if is_ranked(vocabulary):
            return {"tokenizer.model": write_ranks(vocabulary)} | template
        return self.for_huggingface()

    def for_huggingface(self) -> dict[str, bytes]:
        """The files as they are where the checkpoint has them; else a tokenizer.json that tokenizes alike."""
        if self.tokenizer.kind == "tokenizer.json":
            present = [self.path.parent / name for name in HF_NAMES if (self.path.parent / name).is_file()]
            return {file.name: file.read_bytes() for file in present}
        files = {"tokenizer_config.json": json_bytes(self._config())}
        if self._proto is not None:
            files["tokenizer.model"] = self._proto
        vocabulary = self.tokenizer.vocabulary()
        if vocabulary.kind == "spm" and (vocabulary.charsmap or vocabulary.remove_extra_whitespaces):
            self.warnings.append("no tokenizer.json is written for a sentencepiece model that normalizes text")
            return files
        spec = write_spec(vocabulary, self.tokenizer.bos_id if self.tokenizer.add_bos else None)
        return files | {"tokenizer.json": json_bytes(spec)}

    def for_gguf(self, vocab_size: int, stop_ids: tuple[int, ...]) -> dict[str, Value]:
        """The `tokenizer.*` metadata, with as many tokens as the embedding has rows."""
        fields = dict(self.tokenizer.gguf_metadata())
        if self._tokens.prefix in ("first", "never"):
            self.warnings.append(
                "GGUF puts a space in front of every text; this tokenizer does not between control tokens"
            )
        if any(map(any, self._tokens.matching.values())):
            self.warnings.append("GGUF cannot say that added tokens take white space along, or are whole words")
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        if len(tokens) > vocab_size:
            self.warnings.append(f"the last {len(tokens) - vocab_size} tokens have no embedding and are left out")
        padding = range(len(tokens), vocab_size)
        fields["tokenizer.ggml.tokens"] = tokens[:vocab_size] + [f"[PAD{id}]" for id in padding]
        fields["tokenizer.ggml.token_type"] = types[:vocab_size] + [int(TokenType.UNUSED) for _ in padding]
        if scores := fields.get("tokenizer.ggml.scores"):
            fields["tokenizer.ggml.scores"] = scores[:vocab_size] + [0.0 for _ in padding]
        if TokenType.UNKNOWN in types:
            fields["tokenizer.ggml.unknown_token_id"] = types.index(TokenType.UNKNOWN)
        others = [id for id in stop_ids if id != self.tokenizer.eos_id]
        for name, id in zip(("eot", "eom"), others, strict=False):
            fields[f"tokenizer.ggml.{name}_token_id"] = id
        return {key: as_value(key, value) for key, value in fields.items()}

    def _config(self) -> dict[str, Any]:
        """tokenizer_config.json, for a tokenizer.json to be used as it is."""
        tokenizer = self.tokenizer
        names = {id: token for token, id in tokenizer.special_tokens.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        config: dict[str, Any] = {name: names[id] for name, id in ids.items() if id in names}
        config |= {
            "add_bos_token": tokenizer.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if (prefix := self._tokens.prefix) is not None:
            config["tokenizer_class"] = "LlamaTokenizer"
            config |= {"legacy": prefix == "always", "add_prefix_space": prefix != "never"}
        if added := self._added():
            config["added_tokens_decoder"] = added
        if tokenizer.chat_template is not None:
            config["chat_template"] = tokenizer.chat_template
        return config

    def _added(self) -> dict[str, dict[str, Any]]:
        """Tokens that a file of pieces or ranks cannot say: those found in a special way, or under another name."""
        is_known = SPECIAL.__contains__ if self.tokenizer.kind == "tiktoken" else lambda token: True
        return {
            str(id): {
                **{
                    "content": self._tokens.tokens[id],
                    "special": self._tokens.types[id] == TokenType.CONTROL,
                },
                **matching._asdict(),
            }
            for id, matching in self._tokens.matching.items()
            if any(matching) or not is_known(self._tokens.tokens[id])
        }

    def _proto_from_pieces(self) -> bytes:
        """A sentencepiece model from a tokenizer.json of pieces."""
        vocabulary = self.tokenizer.vocabulary()
        unknown = next(iter(vocabulary.of_type(TokenType.UNKNOWN).values()), 0)
        ids = {"unk": unknown, "bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "pad": -1}
        return write_proto(vocabulary, ids)


def _sentencepiece(path: Path, vocabulary: Vocabulary) -> bytes | None:
    """The sentencepiece model at `path`, with what `vocabulary` adds; None for a file of another kind."""
    if Tokenizer(path).sp_model is None:
        return None
    return with_added_pieces(path.read_bytes(), vocabulary)
