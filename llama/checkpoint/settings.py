"""Configuration from a file that nobody vouches for: keys are taken by name, type and range; the rest is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files.errors import CheckpointError, shown
from ..files.json import read_json
from ..model import ModelArgs
from ..rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    yarn_magnitude,
)

MAX_INT = 2**31 - 1
MAX_LAYERS = 10_000
MAX_NUMBERS = 2**40  # of one weight
REQUIRED = object()
"""As a default: the key must be there."""


class Settings:
    """The keys of one JSON object (or one GGUF header), each taken at most once; `unknown` are those left."""

    def __init__(self, values: dict[str, Any], file: Path, prefix: str = "") -> None:
        self.values = values
        self.file = file
        self.prefix = prefix
        self._taken: set[str] = set()

    @property
    def unknown(self) -> tuple[str, ...]:
        """Keys that nothing has asked for, with their section's name in front."""
        return tuple(self.prefix + key for key in self.values if key not in self._taken)

    def integer(self, key: str, default: Any = None, low: int = 1, high: int = MAX_INT) -> Any:
        """The whole number at `key`, within low..high; `default` where it is absent or null."""
        value = self._take(key, default, (int,), "a whole number")
        if value is not default and not low <= value <= high:
            raise self.error(key, value, f"a whole number from {low} to {high} is allowed")
        return value

    def number(self, key: str, default: Any = None, low: float = 1e-30, high: float = 1e30) -> Any:
        """The number at `key`, within low..high; `default` where it is absent or null."""
        value = self._take(key, default, (int, float), "a number")
        if value is not default and not low <= value <= high:
            raise self.error(key, value, f"a number from {low:g} to {high:g} is allowed")
        return value if value is default else float(value)

    def boolean(self, key: str, default: Any = None) -> Any:
        """True or false at `key`; `default` where it is absent or null."""
        return self._take(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = None) -> Any:
        """The string at `key`; `default` where it is absent or null."""
        return self._take(key, default, (str,), "a string")

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of strings at `key`; none where it is absent or null."""
        value = self._take(key, (), (list,), "a list of strings")
        if not all(type(text) is str for text in value):
            raise self.error(key, value, "a list of strings is allowed")
        return tuple(value)

    def section(self, key: str) -> Settings | None:
        """The object at `key` as settings of its own; None where it is absent or null."""
        value = self._take(key, None, (dict,), "an object")
        return None if value is None else Settings(value, self.file, f"{self.prefix}{key}.")

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them at `key`."""
        value = self._take(key, (), (int, list), "a token id or a list of them")
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(type(token) is int and -1 <= token <= MAX_INT for token in ids):
            raise self.error(key, value, "a token id or a list of them is allowed")
        return tuple(token for token in ids if token >= 0)

    def ignore(self, *keys: str) -> None:
        """Marks keys as known that change nothing here."""
        self._taken.update(keys)

    def refuse(self, key: str, *harmless: Any) -> None:
        """Raises if `key` asks for mathematics that is not built; null and `harmless` (else false) do not."""
        self._taken.add(key)
        value = self.values.get(key)
        if value is not None and value not in (harmless or (False,)):
            raise CheckpointError(f"{self.file}: {self.prefix}{key} = {shown(value)} is not supported")

    def error(self, key: str, value: Any, allowed: str) -> CheckpointError:
        """What to raise for a value that is not allowed."""
        return CheckpointError(f"{self.file}: {self.prefix}{key} is {shown(value)}, but {allowed}")

    def _take(self, key: str, default: Any, kinds: tuple[type, ...], allowed: str) -> Any:
        self._taken.add(key)
        value = self.values.get(key)
        if value is None and default is REQUIRED:
            raise CheckpointError(f"{self.file}: {self.prefix}{key} is missing")
        if value is None:
            return default
        if type(value) not in kinds:
            raise self.error(key, value, f"{allowed} is allowed")
        return value


def rope_scaling(settings: Settings, default_original: int | None = None) -> RopeScaling | None:
    """Rope scaling from Hugging Face's keys, old (`type`) and new (`rope_type`) spelling alike.

    Raises CheckpointError for kinds that are not in ROPE_KINDS.
    """
    kind = settings.text("rope_type") or settings.text("type") or "default"
    settings.ignore("type")
    settings.refuse("partial_rotary_factor", 1.0)
    if kind not in ROPE_KINDS:
        *names, last = ROPE_KINDS
        raise CheckpointError(
            f"{settings.file}: rope scaling {shown(kind)} is not supported; {', '.join(names)} and {last} are"
        )
    return ROPE_KINDS[kind](settings, default_original)


def _no_scaling(settings: Settings, default_original: int | None) -> None:
    settings.ignore("factor", "original_max_position_embeddings")


def _linear(settings: Settings, default_original: int | None) -> LinearScaling:
    settings.ignore("original_max_position_embeddings")
    return LinearScaling(settings.number("factor", REQUIRED))


def _llama3(settings: Settings, default_original: int | None) -> Llama3Scaling:
    original = _original(settings, default_original)
    low, high = settings.number("low_freq_factor", 1.0), settings.number("high_freq_factor", 4.0)
    if low >= high:
        raise settings.error("high_freq_factor", high, f"more than low_freq_factor ({low:g}) is needed")
    return Llama3Scaling(settings.number("factor", REQUIRED), low, high, original)


def _yarn(settings: Settings, default_original: int | None) -> YarnScaling:
    original = _original(settings, default_original)
    is_stretched = default_original is not None and default_original > original  # the context that is stated
    factor = settings.number("factor", default_original / original if is_stretched else REQUIRED)
    attention_factor = settings.number("attention_factor", low=0.0)
    mscale, all_dims = (
        settings.number("mscale", 0.0, low=0.0),
        settings.number("mscale_all_dim", 0.0, low=0.0),
    )
    if attention_factor is None and mscale and all_dims:
        attention_factor = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dims)
    settings.ignore("finetuned")
    return YarnScaling(
        factor,
        original,
        settings.number("beta_fast", 32.0, low=1e-3, high=1e6),
        settings.number("beta_slow", 1.0, low=1e-3, high=1e6),
        attention_factor,
        settings.boolean("truncate", True),
    )


def _dynamic(settings: Settings, default_original: int | None) -> DynamicScaling:
    if default_original is None:
        return DynamicScaling(settings.number("factor", REQUIRED), _original(settings, None))
    settings.ignore("original_max_position_embeddings")  # config.json says it in max_position_embeddings
    return DynamicScaling(settings.number("factor", REQUIRED), default_original)


def _original(settings: Settings, default: int | None) -> int:
    """The context that a model was trained at."""
    return settings.integer("original_max_position_embeddings", REQUIRED if default is None else default)


ROPE_KINDS: dict[str, Callable[[Settings, int | None], RopeScaling | None]] = {
    "default": _no_scaling,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
}


def rope_section(scaling: RopeScaling) -> dict[str, Any]:
    """Rope scaling in Hugging Face's words, for old and new readers."""
    names = {"original_max_seq_len": "original_max_position_embeddings"}
    fields = {names.get(name, name): value for name, value in asdict(scaling).items() if value is not None}
    return {"rope_type": scaling.kind, "type": scaling.kind} | fields


def generation_config(folder: Path) -> tuple[dict[str, float], tuple[int, ...], int | None]:
    """What `generation_settings` finds in a directory's generation_config.json, if there is one."""
    file = folder / "generation_config.json"
    return generation_settings(Settings(read_json(file), file)) if file.is_file() else ({}, (), None)


def generation_settings(settings: Settings) -> tuple[dict[str, float], tuple[int, ...], int | None]:
    """Sampling defaults, stop ids and `max_length` of a generation_config.json."""
    defaults: dict[str, float] = {}
    for key, high in (("temperature", 100.0), ("top_p", 1.0), ("min_p", 1.0), ("repetition_penalty", 100.0)):
        value = settings.number(key, low=0.0, high=high)
        if value is not None:
            defaults[key] = value
    top_k = settings.integer("top_k", low=0)
    if top_k is not None:
        defaults["top_k"] = top_k
    if settings.boolean("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults, settings.ids("eos_token_id"), settings.integer("max_length", low=0) or None


def validate_args(args: ModelArgs, file: Path) -> ModelArgs:
    """`args` if a model can have this shape; raises CheckpointError that names what does not fit."""
    largest = args.dim * max(args.hidden_dim, args.vocab_size, args.n_heads * args.head_dim)
    problems = [
        (
            largest > MAX_NUMBERS,
            f"its largest weight would have {largest} numbers; up to {MAX_NUMBERS} are allowed",
        ),
        (args.n_layers > MAX_LAYERS, f"{args.n_layers} layers; up to {MAX_LAYERS} are allowed"),
        (
            args.n_heads % args.n_kv_heads,
            f"{args.n_heads} heads cannot share {args.n_kv_heads} key/value heads",
        ),
        (args.head_dim < 1, f"dim {args.dim} is too small for {args.n_heads} heads"),
        (args.head_dim % 2, f"head_dim {args.head_dim} is odd; rotary positions need pairs"),
        (
            isinstance(args.rope_scaling, YarnScaling) and args.rope_theta <= 1,
            f"a rope_theta of {args.rope_theta:g} is too small for yarn",
        ),
        (
            isinstance(args.rope_scaling, DynamicScaling) and args.head_dim < 4,
            f"head_dim {args.head_dim} is too small for dynamic rope scaling",
        ),
        (not 0 < args.hidden_dim <= MAX_INT, f"hidden_dim {args.hidden_dim} is not a size"),
    ]
    for wrong, problem in problems:
        if wrong:
            raise CheckpointError(f"{file}: {problem}")
    return args
