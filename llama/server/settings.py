"""What a server can be told: one table, from which the command has its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from llama.options import Option, Options


def _setting(default: Any, help: str, **option: Any) -> Any:
    return field(default=default, metadata={"option": {"help": help, **option}})


@dataclass(frozen=True)
class ServerSettings:
    """How `llama serve` listens, and what it bears. Times are seconds."""

    host: str = _setting("127.0.0.1", "The address to listen at; 0.0.0.0 is all.")
    port: int = _setting(8000, "The port to listen at; 0 takes a free one.", least=0, most=65535)
    name: str | None = _setting(None, "What the model is called in /v1/models; its path's name if left out.")
    model_dir: Path | None = _setting(None, "A folder of models: MODEL is the name of one, /v1/models lists all.")
    lora_dir: Path | None = _setting(None, "A folder of adapters: those that clients with the admin key may load.")
    admin_key: str | None = _setting(None, "The key of who may load models and adapters; without one nobody may.")
    strict_model: bool = _setting(False, "Refuse requests for a model of another name.")
    ignore_unknown: bool = _setting(False, "Ignore fields that are not known instead of refusing them.")
    ollama: bool = _setting(False, "Serve Ollama's /api routes too, for editors that look for them.")
    max_queue: int = _setting(128, "Requests taken in at one time, at work or waiting; more get 429.", least=1)
    max_n: int = _setting(16, "The most answers to one request.", least=1)
    api_key: list[str] | None = _setting(None, "Ask for one of these keys; several times, or joined by commas.")
    api_key_file: Path | None = _setting(None, "A file of keys, one a line.")
    allowed_hosts: list[str] | None = _setting(None, "Further names under which clients reach the server; * is all.")
    allowed_origins: list[str] | None = _setting(
        None, "Sites whose pages may use the server, as https://a.b; * is all."
    )
    max_body: int = _setting(4 << 20, "The most bytes of a request's body.", least=1)
    body_timeout: float = _setting(
        10.0, "How long a request's body may stay away, if it does not keep coming.", least=1
    )
    timeout: float = _setting(3600.0, "How long a request may take.", least=1)
    send_timeout: float = _setting(30.0, "How long a client may take to read what was sent.", least=1)
    ping: float = _setting(15.0, "How long a stream may be silent before a comment is sent; 0: for ever.", least=0)
    shutdown_timeout: float = _setting(
        30.0, "How long requests may go on once a stop or another model was asked for.", least=0
    )
    rank_timeout: float = _setting(60.0, "Under torchrun: how long a rank may not be heard of.", least=1)
    ssl_certfile: Path | None = _setting(None, "A certificate, for https; a PEM file.")
    ssl_keyfile: Path | None = _setting(None, "Its private key, if that is not in the same file.")
    quiet: bool = _setting(False, "Tell nothing of requests on standard error.")
    num_workers: int = _setting(2, "Threads for templates and tokenizing.", least=1)

    def __post_init__(self) -> None:
        for name, folder in (("--model-dir", self.model_dir), ("--lora-dir", self.lora_dir)):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"{name} is {folder}: no such directory")

    def keys(self) -> list[str]:
        """All that were given, in whatever way. Raises ValueError for one that clients could not send."""
        text = "" if self.api_key_file is None else self.api_key_file.read_text(encoding="utf-8")
        keys = listed(self.api_key) + [line for line in map(str.strip, text.splitlines()) if line[:1] not in ("", "#")]
        for number, key in enumerate(keys, 1):
            validate_key(key, f"API key {number} of {len(keys)}")
        if self.admin_key is not None:
            validate_key(self.admin_key, "the admin key")
        if self.api_key_file is not None and not keys:
            raise ValueError(f"{self.api_key_file} has no API key: write one a line")
        return keys


def validate_key(key: str, what: str) -> None:
    """Raises ValueError, without showing it, for a key that no client could send."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{what} has spaces or other than ASCII, or is empty: no client can send it")


def listed(values: Sequence[str] | None) -> list[str]:
    """Values that came one by one or joined by commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _option(name: str, type: Any, default: Any, known: dict[str, Any]) -> Option:
    return Option(name, type=type, default=None if default is MISSING else default, **known)


_TYPES = get_type_hints(ServerSettings)
SERVER = Options(_option(f.name, _TYPES[f.name], f.default, f.metadata["option"]) for f in fields(ServerSettings))
