"""What the Hugging Face files beside a vocabulary say about the use of its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .vocabulary import Controls, TokenizerError

# How published vocabularies name the token that begins a text, and those that end a turn.
STARTS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<｜begin▁of▁sentence｜>")
TURN_ENDS = (
    *("</s>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<eos>"),
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "▁<EOT>"),
)


def first_known(names: Iterable[str | None], special_tokens: Mapping[str, int]) -> int:
    """The id of the first name that is a special token, -1 for none."""
    return next((special_tokens[name] for name in names if name in special_tokens), -1)


def with_config(controls: Controls, folder: Path, special_tokens: Mapping[str, int]) -> Controls:
    """`controls`, overruled by the Hugging Face files that lie beside the vocabulary, if there are any."""
    config: dict[str, Any] = {}  # of two files that say something, the later one counts
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    changes: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in special_tokens:
            changes[f"{name}_id"] = special_tokens[token]
    ends = config.get("eos_token_id", [])
    changes["ends"] = tuple(ends if isinstance(ends, list) else [ends])
    if isinstance(config.get("add_bos_token"), bool):
        changes["add_bos"] = config["add_bos_token"]
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return replace(controls, **changes, chat_template=template)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TokenizerError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is not a JSON object")
    return value
