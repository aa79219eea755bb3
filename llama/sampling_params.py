"""What a request may ask of the sampler: one table, read by the library, the commands and OpenAI's bodies."""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # the commands show their options without torch

LogitsProcessor = Callable[[list[int], Tensor], Tensor]  # tokens so far, logits (vocab,) -> logits (vocab,)


class SamplingError(ValueError):
    """A sampling parameter that cannot be used; `param` is its name."""

    def __init__(self, param: str, allowed: str, given: object) -> None:
        super().__init__(f"{param} must be {allowed}, got {reprlib.repr(given)}")
        self.param = param


@dataclass(frozen=True)
class _Number:
    """The numbers that a field may hold. A NaN fails the comparison, and no upper end is infinity."""

    low: float
    high: float
    words: str
    kind: type = Real
    optional: bool = False

    def __call__(self, name: str, value: object) -> int | float | None:
        if value is None and self.optional:
            return None
        is_number = isinstance(value, self.kind) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise SamplingError(name, self.words + (" or None" if self.optional else ""), value)
        return int(value) if self.kind is Integral else float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SamplingError(name, "True or False", value)
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise SamplingError(name, "a text or a list of texts, none of them empty", value)
    return tuple(texts)


def _ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise SamplingError(name, "a list of token ids", value)
    return tuple(_ID(name, token) for token in value)


def _biases(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise SamplingError(name, "a mapping of token ids to numbers", value)
    return {_ID(name, token): bias if bias == -math.inf else _BIAS(name, bias) for token, bias in value.items()}


def _functions(name: str, value: object) -> tuple[LogitsProcessor, ...]:
    if not isinstance(value, list | tuple) or not all(map(callable, value)):
        raise SamplingError(name, "a list of functions", value)
    return tuple(value)


def _schema(name: str, value: object) -> str | None:
    """A JSON schema as text, its keys in their order."""
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if isinstance(schema, Mapping):
            return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        pass
    raise SamplingError(name, "a JSON schema: a mapping, or its JSON", value)


def _text(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SamplingError(name, "a text or None", value)
    return value


_ID = _Number(0, sys.maxsize, "made of token ids (whole numbers, 0 or more)", Integral)
_BIAS = _Number(-1e30, 1e30, "made of numbers up to 1e30 in size, or -inf (never)")  # finite in float32
_SHARE = _Number(0, 1, "a number from 0 to 1", optional=True)
_PENALTY = _Number(-2, 2, "a number from -2 to 2")
_COUNT = _Number(0, sys.maxsize, "a whole number, 0 or more", Integral)
_MOST = replace(_COUNT, optional=True)
_NUMBER = _Number(1, sys.maxsize, "a whole number, 1 or more", Integral)
_FINITE = _Number(-sys.float_info.max, sys.float_info.max, "a finite number (0 or less: greedy)", optional=True)
_TOP_K = _Number(0, sys.maxsize, "a whole number, 0 (off) or more", Integral, optional=True)
_FACTOR = _Number(0.01, 100, "a number from 0.01 to 100 (1: off)", optional=True)
_SEED = _Number(-(2**63), 2**63 - 1, "a whole number of 64 bits", Integral, optional=True)
_TOP = _Number(0, 20, "a whole number from 0 to 20", Integral, optional=True)  # OpenAI's limit


@dataclass(frozen=True)
class SamplingField:
    """What is known of a field of SamplingParams besides its name, type and default."""

    check: Callable[[str, object], Any]  # (name, value) -> the value as it is kept; raises SamplingError
    help: str
    otherwise: float | None = None  # what None comes to where the model's generation_config says nothing
    option: bool = False  # the commands have it as an option
    body: bool = True  # every body of OpenAI's API that samples has it, under this name


def _field(default: Any, check: Callable[[str, object], Any], help: str, **known: Any) -> Any:
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"known": SamplingField(check, help, **known)})


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and when they end. Immutable; a bad value raises SamplingError.

    None in one of the first five fields means: as the model's generation_config says, else as the reference
    does (temperature 0.6, top_p 0.9, the rest off). `resolve` puts the numbers there.
    """

    temperature: float | None = _field(
        None, _FINITE, "How freely to sample; 0 takes the likeliest token.", otherwise=0.6, option=True
    )
    top_p: float | None = _field(
        None,
        _SHARE,
        "Sample among the likeliest tokens that reach this probability; 0: the likeliest.",
        otherwise=0.9,
        option=True,
    )
    top_k: int | None = _field(
        None, _TOP_K, "Sample among this many of the likeliest tokens; 0: all.", otherwise=0, option=True
    )
    min_p: float | None = _field(
        None, _SHARE, "Sample among tokens at least this share as probable as the likeliest.", otherwise=0.0
    )
    repetition_penalty: float | None = _field(
        None,
        _FACTOR,
        "Above 1: tokens that are already in the prompt or the answer become less likely.",
        otherwise=1.0,
        option=True,
    )
    presence_penalty: float = _field(0.0, _PENALTY, "Off the logit of every token of the answer.")
    frequency_penalty: float = _field(0.0, _PENALTY, "Off a token's logit for each time that it is in the answer.")
    logit_bias: Mapping[int, float] = _field(dict, _biases, "Token id -> what is added to its logit; -inf: never.")
    seed: int | None = _field(None, _SEED, "The same seed gives the same answer.", option=True)
    max_tokens: int | None = _field(None, _MOST, "The most tokens of an answer.", option=True)
    min_tokens: int = _field(0, _COUNT, "The fewest tokens of an answer.")
    stop: tuple[str, ...] = _field((), _texts, "End the answer at this text, or the first of several.", option=True)
    stop_token_ids: tuple[int, ...] = _field((), _ids, "End the answer at these tokens.")
    ignore_eos: bool = _field(False, _flag, "Go on where the model would end.")
    logprobs: int | None = _field(None, _TOP, "With each token its logprob and those of so many best.", body=False)
    prompt_logprobs: int | None = _field(None, _TOP, "The same for the prompt.", body=False)
    echo: bool = _field(False, _flag, "Let the answer begin with the prompt.", body=False)
    n: int = _field(1, _NUMBER, "How many answers to give.")
    logits_processors: tuple[LogitsProcessor, ...] = _field(
        (), _functions, "Functions that change the logits.", body=False
    )

    json_schema: str | Mapping[str, Any] | None = _field(
        None, _schema, "The answer is JSON that this schema describes."
    )
    regex: str | None = _field(None, _text, "The whole answer matches this regular expression.")
    grammar: str | None = _field(None, _text, "The answer is a text of this grammar, in Lark or GBNF.")

    def __post_init__(self) -> None:
        for name, known in SAMPLING_FIELDS.items():
            object.__setattr__(self, name, known.check(name, getattr(self, name)))
        given = [name for name in SHAPES if getattr(self, name) is not None]
        if len(given) > 1:
            raise SamplingError(given[1], f"left out beside {given[0]}", getattr(self, given[1]))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)

    @property
    def shape(self) -> tuple[str, str] | None:
        """What constrains the answer: which of SHAPES, and its text."""
        return next(((name, text) for name in SHAPES if (text := getattr(self, name)) is not None), None)

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to the model's generation_config."""
        return all(getattr(self, name) is not None for name in _OTHERWISE)

    def resolve(self, defaults: Mapping[str, object] | None = None) -> SamplingParams:
        """The same with what was not given taken from `defaults`, else from the reference.

        defaults: a model's generation_config as read. `do_sample: false` there means greedy; keys of no concern
        here are ignored; a bad value raises SamplingError.
        """
        defaults = defaults or {}
        missing = {name: value for name, value in _OTHERWISE.items() if getattr(self, name) is None}
        found = {name: defaults[name] for name in missing if defaults.get(name) is not None}
        if "temperature" in missing and defaults.get("do_sample") is False:
            found["temperature"] = 0.0
        return replace(self, **missing | found) if missing else self

    def validate(self, vocab_size: int) -> None:
        """Raise SamplingError for a token id that a vocabulary of this size lacks."""
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    raise SamplingError(name, f"made of ids from 0 to {vocab_size - 1} (the vocabulary)", token)


SHAPES = ("json_schema", "regex", "grammar")  # the fields of which one may say what an answer looks like
SAMPLING_FIELDS: dict[str, SamplingField] = {f.name: f.metadata["known"] for f in fields(SamplingParams)}
_OTHERWISE = {name: s.otherwise for name, s in SAMPLING_FIELDS.items() if s.otherwise is not None}
