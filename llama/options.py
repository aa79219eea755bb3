"""The options that commands share: a row for each, under the name that `Llama.build` or `SamplingParams` gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from llama.sampling_params import SAMPLING_FIELDS, SamplingParams


@dataclass(frozen=True)
class Option:
    name: str  # of the parameter that it sets
    help: str
    type: Any = str | None
    default: Any = None
    flag: str | None = None  # None: the name with dashes
    least: int | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        """What stands in a command's signature for it."""
        flag = self.flag or "--" + self.name.replace("_", "-")
        kind = Annotated[self.type, typer.Option(flag, help=self.help, min=self.least)]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=kind)


class Options(tuple[Option, ...]):
    """Rows of a table, of which a command may take some, with defaults of its own."""

    def only(self, *names: str) -> Options:
        return Options(option for option in self if option.name in names)

    def without(self, *names: str) -> Options:
        return Options(option for option in self if option.name not in names)

    def with_defaults(self, **defaults: object) -> Options:
        return Options(replace(option, default=defaults.get(option.name, option.default)) for option in self)


def takes(**groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of each group.

    The command gets a group's values as one dictionary under the group's name, without those that are None.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**values: Any) -> None:
            for name, options in groups.items():
                given = {option.name: values.pop(option.name) for option in options}
                values[name] = {key: value for key, value in given.items() if value is not None}
            command(**values)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.name not in groups]
        parameters += [option.parameter for options in groups.values() for option in options]
        call.__signature__ = inspect.Signature(parameters)
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


MODEL = Options(  # parameters of `Llama.build`
    [
        Option("tokenizer_path", "The tokenizer's file, if not in or beside MODEL.", flag="--tokenizer"),
        Option("chat_format", "A chat format's name, or a Jinja template's file."),
        Option("max_seq_len", "Tokens of prompt and answer together.", int | None, least=1),
        Option("device", "auto, cpu, cuda, mps ...", str, "auto"),
        Option("dtype", "auto, bf16, fp16 or fp32.", str, "auto"),
        Option("quantization", "sym_int4, nf4, q8_0 ...; none unpacks low-bit blocks."),
        Option("kv_dtype", "auto, or int8: keys and values in 8 bits, for long contexts.", str, "auto"),
    ]
)

TYPES = get_type_hints(SamplingParams) | {"stop": list[str] | None}  # given several times
SAMPLER = Options(Option(name, known.help, TYPES[name]) for name, known in SAMPLING_FIELDS.items() if known.option)
