"""What the Hugging Face files beside a vocabulary say about the use of its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .added import AddedToken, Matching
from .vocabulary import Controls, TokenizerError

# How published vocabularies name the token that begins a text, and those that end a turn.
STARTS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<｜begin▁of▁sentence｜>")
TURN_ENDS = (
    "</s>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<eos>",
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "▁<EOT>",
)  # fmt: skip


def first_known(names: Iterable[str | None], special_tokens: Mapping[str, int]) -> int:
    """The id of the first name that is a special token, -1 for none."""
    return next((special_tokens[name] for name in names if name in special_tokens), -1)


@dataclass(frozen=True)
class Beside:
    """The Hugging Face files in a folder: `config` is what all of them say together, `added` the tokens they add."""

    config: dict[str, Any]
    added: tuple[AddedToken, ...]
    chat_template: str | None

    @property
    def prefix(self) -> str | None:
        """Where transformers' own class for Llama puts a space in front: before "first" or "always", or "never".

        None where no such class is named: then the vocabulary's file says it.
        """
        if str(self.config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
            return None
        if self.config.get("add_prefix_space", True) is False:
            return "never"
        return "always" if self.config.get("legacy", False) else "first"

    def controls(self, controls: Controls, special_tokens: Mapping[str, int]) -> Controls:
        """`controls`, overruled by what the files say."""
        changes: dict[str, Any] = {}
        for name in ("bos", "eos", "pad"):
            token = _content(self.config.get(f"{name}_token"))
            if token in special_tokens:
                changes[f"{name}_id"] = special_tokens[token]
        ends = self.config.get("eos_token_id", [])
        changes["ends"] = tuple(ends if isinstance(ends, list) else [ends])
        if isinstance(self.config.get("add_bos_token"), bool):
            changes["add_bos"] = self.config["add_bos_token"]
        return replace(controls, **changes, chat_template=self.chat_template)


def read_beside(folder: Path, chat_template: str | None = None) -> Beside:
    """What lies beside a vocabulary; nothing of it has to be there. Raises TokenizerError.

    `chat_template`: what to use instead of the model's own.
    """
    config: dict[str, Any] = {}  # of two files that say something, the later one counts
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {key: value for key, value in read_object(folder / name).items() if value is not None}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return Beside(config, tuple(_added(config, folder / "added_tokens.json")), chat_template or template)


NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _added(config: dict[str, Any], file: Path) -> Iterator[AddedToken]:
    """The tokens that files add: those with ids by their ids, then those that are only named."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [config[name] for name in NAMED if config.get(name)] + extra
    names = {_content(token) for token in named}
    if "added_tokens_decoder" in config:
        for id, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
            yield AddedToken.from_json(token, int(id), special=token["content"] in names)
    elif file.is_file():
        for content, id in sorted(read_object(file).items(), key=lambda item: item[1]):
            special = content in names
            yield AddedToken(content, id, special, Matching(normalized=not special))
    for token in named:
        if isinstance(token, dict):
            yield AddedToken.from_json(token, None, special=True)
        else:
            yield AddedToken(token, None, special=True)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TokenizerError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is not a JSON object")
    return value
