"""The options that commands share: a row for each, under the name that `Llama.build` or `SamplingParams` gives it."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
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
    most: int | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        """What stands in a command's signature for it."""
        flag = self.flag or "--" + self.name.replace("_", "-")
        kind = Annotated[
            self.type, typer.Option(flag, help=self.help, min=self.least, max=self.most, show_envvar=False)
        ]
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
        Option("tool_format", "How the model calls tools, where that is not found: hermes, llama3 ..."),
        Option("max_seq_len", "Tokens of prompt and answer together.", int | None, least=1),
        Option(
            "pipeline_parallel_size", "Under torchrun: in how many stages of ranks the layers lie.", int | None, least=1
        ),
        Option("device", "auto, cpu, cuda, mps ...", str, "auto"),
        Option("dtype", "auto, bf16, fp16 or fp32.", str, "auto"),
        Option("quantization", "sym_int4, nf4, q8_0 ...; none unpacks low-bit blocks."),
        Option("kv_cache_memory", "For keys and values, as 2GiB; half of what is free if left out."),
        Option("kv_dtype", "auto, or int8: keys and values in 8 bits, for long contexts.", str, "auto"),
        Option(
            "compile",
            "Compute with a package compiled ahead of time, kept in your cache; left out, if one is there. On a GPU: "
            "with CUDA graphs, also if left out.",
            bool | None,
            flag="--compile/--no-compile",
        ),
        Option(
            "trust_compiled",
            "Run the native code in an exported MODEL, which can do whatever you can.",
            bool | None,
            flag="--trust-compiled",
        ),
        Option("adapter", "A LoRA adapter to merge in; DIR=0.7 gives it a weight.", list[str] | None, flag="--lora"),
        Option("draft", "What guesses ahead: lookup (in the text so far), a small model's checkpoint, or none."),
    ]
)

TYPES = get_type_hints(SamplingParams) | {"stop": list[str] | None}  # given several times
SAMPLER = Options(Option(name, known.help, TYPES[name]) for name, known in SAMPLING_FIELDS.items() if known.option)
SHAPE = Options(
    [
        Option("json_schema", "A file with a JSON schema, which describes the answer.", Path | None),
        Option("regex", SAMPLING_FIELDS["regex"].help),
        Option("grammar", "A file with the answer's grammar, in Lark or GBNF.", Path | None),
    ]
)


def set_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """What `--config` does before other options are looked at: a TOML file's values are their defaults.

    It may set whatever the command takes, under the option's name with dashes or underscores.
    """
    if path is None:
        return None
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    known = {parameter.name: parameter for parameter in context.command.params}
    values = {name.replace("-", "_"): value for name, value in given.items()}
    for name, value in values.items():
        if name not in known or name == "config":
            names = ", ".join(sorted(known.keys() - {"config", "help"}))
            raise typer.BadParameter(f"{path} sets {name!r}, which is no option here: there are {names}")
        wanted = list if known[name].nargs != 1 or getattr(known[name], "multiple", False) else str | int | float
        is_flag = getattr(known[name], "is_flag", False)
        if not isinstance(value, bool if is_flag else wanted) or isinstance(value, bool) is not is_flag:
            what = "true or false" if is_flag else "a list" if wanted is list else "one value"
            raise typer.BadParameter(f"{path} sets {name!r} to {value!r}: give {what}")
    context.default_map = {**(context.default_map or {}), **values}
    return path


CONFIG = Annotated[
    Path | None,
    typer.Option(
        help="A TOML file with options by their names; flags and LLAMA_* come first.",
        callback=set_defaults,
        is_eager=True,
        dir_okay=False,
        exists=True,
    ),
]
