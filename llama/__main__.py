"""The command line: one function a command, which turns flags into a call.

This file is long because there are many commands, each with the help of its own arguments.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama.options import CONFIG, MODEL, SAMPLER, SHAPE, takes
from llama.program import fail, running
from llama.server.settings import SERVER, ServerSettings
from llama.server.tutorial import TUTORIAL_PORT, TutorialOptions, chosen_adapters, folders_here, tutorial_load
from llama.streams import note, tell

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from llama.client import RemoteModel
    from llama.generation import Llama
    from llama.sampling_params import SamplingParams

app = typer.Typer(
    name="llama",
    help="Runs Llama models. MODEL is any checkpoint: a directory, a .gguf file; left out, the embedded default.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # the lines of a docstring flow
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "A checkpoint; the embedded default if left out."
NAME = re.compile(r"[\w.-]+(/[\w.-]+)+(:[\w.-]+)?", re.ASCII)  # org/name, org/name:type, org/name/file
Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)]
Lora = Annotated[list[str] | None, typer.Option("--lora", help="A LoRA adapter to merge in; DIR=0.7 weighs it.")]

Replicas = Annotated[int | None, typer.Option(min=1, help="So many processes with the model, on Ray.")]
RayAddress = Annotated[
    str | None, typer.Option(help="A Ray cluster's head, as 10.0.0.1:6379, or auto; one of this machine if left out.")
]

OF_ONE_MODEL = ("tokenizer_path", "chat_format", "tool_format", "adapter", "adapters")  # options that no other has

USAGE_ERROR = typer.BadParameter.__base__  # click's, or that of the click inside typer, as the version has it
INTERRUPTED = 130  # what typer returns where a command was ended by Ctrl-C


class WrongCall(ValueError):
    """Arguments that do not fit together."""


@app.command()
@takes(load=MODEL, sample=SAMPLER)
def chat(
    model: Model = None,
    message: Annotated[str | None, typer.Argument(metavar="[MESSAGE]", help="Answer this one and exit.")] = None,
    system: Annotated[str | None, typer.Option(help='The system prompt; "default" is a careful one.')] = None,
    history: Annotated[
        Path | None,
        typer.Option(envvar="LLAMA_HISTORY", help="Keep what is typed in this file, for the next start."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Talk with the model of a server, as http://127.0.0.1:8000, instead.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LLAMA_API_KEY", show_envvar=False, help="The key that the server asks for.")
    ] = None,
    *,
    context: typer.Context,
    load: dict[str, Any],
    sample: dict[str, Any],
) -> None:
    """Talk with a model; Ctrl-C ends an answer, /quit the conversation.

    One argument alone is a MODEL if it exists as a file or directory, or if it has no white space and begins like a
    path (/ ./ ../ ~/), ends in .gguf or reads like org/name; otherwise it is a MESSAGE. What comes through a pipe is
    added to the MESSAGE; without a MESSAGE each line of it is one. With --url one argument is a MESSAGE.
    """
    from llama import terminal
    from llama.chat import DEFAULT_SYSTEM_PROMPT

    if message is None and model is not None and (url is not None or not names_a_model(model)):
        model, message = None, model
    if message is not None and not message.strip():
        raise WrongCall("the message is empty: give a text, or leave it out to talk")
    if url is not None:
        validate_remote(context, model)
        llm, params = remote_to_sample(url, api_key, sample)
    else:
        try:
            llm, params = build_to_sample(model, load, sample)
        except FileNotFoundError as error:
            if message is not None or not NAME.fullmatch(model or ""):
                raise
            raise FileNotFoundError(f"{error}; if it is a message: echo {model} | llama chat") from None
    system = DEFAULT_SYSTEM_PROMPT if system == "default" else system
    conversation = terminal.Chat(llm, params, system, ends_at_once=url is not None)
    if message is None:
        terminal.run(conversation, history)
    else:
        terminal.stream(conversation, terminal.with_piped(llm, message))


@app.command()
@takes(load=MODEL.without("chat_format", "tool_format"), sample=SAMPLER.with_defaults(max_tokens=256), shape=SHAPE)
def complete(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; standard input if left out.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt too.")] = False,
    *,
    load: dict[str, Any],
    sample: dict[str, Any],
    shape: dict[str, Any],
) -> None:
    """Continue a text; the answer takes the shape of a schema, an expression or a grammar, if one is given."""
    from llama import terminal

    if prompt is None and sys.stdin.isatty():
        raise WrongCall("nothing to continue: give --prompt TEXT, or the text on standard input")
    texts = {name: read_shape(given) for name, given in shape.items()}
    llm, params = build_to_sample(model, load, sample | texts | {"echo": echo})
    prompt = llm.share(sys.stdin.read() if prompt is None and llm.rank == 0 else prompt)
    terminal.show(llm, llm.stream_text(prompt, params) if stream else [llm.complete([prompt], params)[0].text])


@app.command()
@takes(load=MODEL)
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request a line; - is standard input.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One answer a line; a stopped job goes on.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    replicas: Replicas = None,
    ray_address: RayAddress = None,
    *,
    load: dict[str, Any],
) -> None:
    """Answer a file of requests in OpenAI's batch format."""
    from llama import report
    from llama.batch import Batch

    if str(source) != "-" and (source.is_dir() or not source.exists()):
        raise FileNotFoundError(f"{source}: no such file; give a file with one request a line")
    if validate_replicas(replicas, ray_address, load):
        path_of(model)  # before a cluster is begun in vain
        from llama.cluster import planned
        from llama.replicated_batch import ReplicatedBatch

        with planned(model, load, replicas, ray_address) as plan:
            counts = report.run_batch(ReplicatedBatch(plan, source, target))
    else:
        llm = build(model, load)
        counts = report.run_batch(Batch(llm, source, target), llm)
    if counts.failed:
        sys.exit(1)


@app.command(context_settings={"auto_envvar_prefix": "LLAMA"})
@takes(listen=SERVER, load=MODEL)
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP, envvar="LLAMA_MODEL", show_envvar=False)
    ] = None,
    config: CONFIG = None,
    model_path: Annotated[str | None, typer.Option("--model_path", hidden=True)] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", hidden=True)] = None,
    infer_dtype: Annotated[str | None, typer.Option("--infer_dtype", hidden=True)] = None,
    model_source: Annotated[str | None, typer.Option("--model_source", hidden=True)] = None,
    model_here: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    cpu: Annotated[bool, typer.Option("--cpu", hidden=True)] = False,
    replicas: Replicas = None,
    ray_address: RayAddress = None,
    *,
    context: typer.Context,
    listen: dict[str, Any],
    load: dict[str, Any],
) -> None:
    """Serve a model to OpenAI's clients, over HTTP.

    Every option may also stand in the environment, as LLAMA_PORT for --port, or in the file that --config names. The
    tutorials' --model_path, --gpus, --infer_dtype and --model_source work too; the port is then 8001. So do --model
    NAME, of the folder models/ if there is one, with --lora NAME, of loras/, and --cpu. --lora DIR merges an adapter
    into the model, --lora NAME=DIR puts it beside the model, for requests that name it as theirs.
    """
    try:
        from llama.server.run import run_replicas, run_server
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is missing: pip install 'llama-native[server]'") from error
    tutorial = TutorialOptions(model_path, gpus, infer_dtype, model_source)
    if tutorial.is_given:
        load |= tutorial_load(tutorial)
        model = model or model_path
        if not is_given(context, "port"):
            listen["port"] = TUTORIAL_PORT
    if model_here is not None:
        if model is not None:
            raise WrongCall(f"MODEL is {model} and --model {model_here}: give one of them")
        model = model_here
        listen |= folders_here(listen)
    if cpu:
        load["device"] = "cpu"
    load["adapter"], load["adapters"] = chosen_adapters(load.get("adapter", ()), listen.get("lora_dir"))
    from llama.checkpoint import DEFAULT_SETTINGS, model_in

    if "model_dir" in listen and not (model and os.path.exists(model)):
        model = str(model_in(listen["model_dir"], model))

    if validate_replicas(replicas, ray_address, load):
        if "admin_key" in listen:
            raise WrongCall("--admin-key changes a model or its adapters at one replica alone: leave --replicas out")
        path_of(model)  # before a cluster is begun in vain
        run_replicas(model, load, ServerSettings(**listen), replicas, ray_address)
        return

    def built(other: str | None = None, options: dict[str, Any] | None = None) -> Llama:
        drawn = {"seed": None}  # each start draws its own
        if other is not None:
            common = {name: value for name, value in load.items() if name not in OF_ONE_MODEL}
            if common.get("draft") not in (None, "lookup", "none"):  # a model of the first one's vocabulary
                del common["draft"]
            return build(other, common | (options or {}) | drawn)
        llm = build(model, load | drawn)
        if model is None:
            llm.defaults = llm.defaults | DEFAULT_SETTINGS
        return llm

    run_server(built, ServerSettings(**listen))


@app.command()
def convert(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="A checkpoint of any format.")] = None,
    target: Annotated[Path | None, typer.Argument(metavar="DST", help="A directory, or a .gguf file.")] = None,
    to: Annotated[str, typer.Option(help="meta, hf or gguf.")] = "hf",
    shards: Annotated[int | None, typer.Option(min=1, help="How many weight files.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="The most bytes of a file, as 5GB (hf).")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; as stored if left out.")] = None,
    lora: Lora = None,
    input_dir: Annotated[Path | None, typer.Option("--input_dir", hidden=True)] = None,
    output_dir: Annotated[Path | None, typer.Option("--output_dir", hidden=True)] = None,
    model_size: Annotated[str | None, typer.Option("--model_size", hidden=True)] = None,
) -> None:
    """Write a checkpoint in another format.

    The old converter's --input_dir, --model_size and --output_dir work too.
    """
    from llama import checkpoint
    from llama.progress import progress_bar

    source = source or (input_dir and str(checkpoint.legacy_source(input_dir, model_size or "")))
    target = target or output_dir
    if source is None or target is None:
        raise WrongCall("give SRC and DST: llama convert llama-2-7b llama-2-7b-hf --to hf")
    with progress_bar("Writing", show=True) as advance:
        warnings = checkpoint.convert(
            checkpoint.resolve(source),
            target,
            to,
            shards=shards,
            dtype=dtype,
            max_shard_size=max_shard_size,
            adapter=lora,
            progress=advance,
        )
    warn(warnings)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint of any format.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    type: Annotated[str, typer.Option(help="sym_int4, asym_int4, sym_int5, asym_int5, sym_int8, nf4, q4_0 ...")],
    lora: Lora = None,
) -> None:
    """Write a checkpoint in a low-bit format, which loads at once."""
    from llama import checkpoint
    from llama.progress import progress_bar
    from llama.quantization import resolve_format

    format = resolve_format(type)
    with progress_bar("Writing", show=True) as advance:
        opened = checkpoint.with_adapters(checkpoint.open_checkpoint(path_of(source)), lora)
        warnings = checkpoint.save_low_bit(opened, target, format, advance)
    warn(warnings)


@app.command()
@takes(load=MODEL.only("tokenizer_path", "dtype", "quantization", "kv_dtype"))
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint of any format.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write; MODEL for other commands.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once; more of them wait.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer together; the model's context if left out.")
    ] = None,
    num_cores: Annotated[int | None, typer.Option(min=1, help="Threads that compute; all if left out.")] = None,
    *,
    load: dict[str, Any],
) -> None:
    """Compile a model ahead of time, for this processor; DIR holds all that it takes to run it.

    This takes a minute or more, and a C++ compiler. Running DIR takes neither.
    """
    from llama.export import export_model

    sizes = {"batch_size": batch_size, "sequence_length": sequence_length, "num_cores": num_cores}
    limits = export_model(model, directory, **sizes, **load)
    tell(
        f"Exported to {directory}: {limits.batch_size} x {limits.sequence_length} tokens, {limits.dtype}, "
        f"{limits.num_cores} threads"
    )


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of any format, or an exported model.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository to make.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Put the files into one that is there.")] = False,
) -> None:
    """Upload a model to the Hugging Face hub, as the one whom HF_TOKEN, or hf auth login, names."""
    from llama import checkpoint

    tell(f"It is at {checkpoint.push(directory, repository, private=private, overwrite=overwrite)}")


@app.command()
@takes(sizes=MODEL.only("max_seq_len", "kv_dtype"))
def inspect(
    model: Model = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Add the memory that it will take.")] = False,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the model.")] = 1,
    *,
    sizes: dict[str, Any],
) -> None:
    """Show what a checkpoint, or an adapter, is, from its headers alone."""
    from llama import checkpoint, report

    path = path_of(model)
    if checkpoint.is_adapter(path):
        report.show_adapter(checkpoint.open_adapter(path))
        return
    found = checkpoint.inspect(path, ranks)
    report.show_inspection(found)
    if estimate:
        report.show_estimates(checkpoint.estimate(found.args, max_batch_size=max_batch_size, world_size=ranks, **sizes))


@app.command()
def verify(model: Model = None) -> None:
    """Check sums, index, shapes and values; exit status 1 if something is wrong."""
    from llama import checkpoint, report

    if not report.show_findings(checkpoint.verify(path_of(model))):
        sys.exit(1)


@app.command()
@takes(load=MODEL.without("chat_format", "tool_format", "max_seq_len", "draft"))
def perplexity(
    model: Model = None,
    file: Annotated[Path | None, typer.Option(help="The text to predict.")] = None,
    encoding: Annotated[str, typer.Option(help="How the text is stored.")] = "utf-8",
    window: Annotated[int | None, typer.Option(min=1, help="Tokens of the sliding window.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="By how many tokens it moves on.")] = None,
    *,
    load: dict[str, Any],
) -> None:
    """Measure how well a model predicts a text."""
    from llama import report
    from llama.perplexity import decoded_text

    if file is None:
        raise WrongCall("give the text: --file TEXT")
    text = decoded_text(file, encoding)
    llm = build(model, load | {"max_seq_len": window})
    report.show_perplexity(llm, text, window, stride)


@app.command()
@takes(load=MODEL.only("device", "kv_dtype", "compile", "draft"))
def bench(
    model: Model = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights instead: 1.1b, 7b, 8b, smollm2-135m, or tiny to try it.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="stored, none or a low-bit format; may be given several times.")
    ] = None,
    vs: Annotated[
        str | None,
        typer.Option(help="Peers: llamacpp, ik, transformers, padded; llamacpp=PYTHON names an interpreter."),
    ] = None,
    works: Annotated[
        str | None, typer.Option(help="Of prompt-512, context-0, -512, -4096, batch-1, -8, -32; all if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side takes its turn.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="For every side; torch's own number if left out.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it, as a .png or .svg file.")] = None,
    *,
    load: dict[str, Any],
) -> None:
    """Measure how fast this machine, this engine and its peers are: prompts, contexts, batches, start-up, memory.

    Sides take turns, medians are compared, and the machine's limits are measured in between. Let nothing else run.
    """
    from llama import report
    from llama.bench.run import Bench, run_bench

    if model is not None and shape is not None:
        raise WrongCall("give a MODEL or --shape, not both")
    path = None if shape else path_of(model)
    wanted = Bench(path, shape, precision, vs, works, rounds, threads, load.pop("device"), load)
    report.show_bench(run_bench(wanted), json, plot)


def build(model: str | None, load: dict[str, Any]) -> Llama:
    """`Llama.build`, with its report on standard error: standard output is for answers."""
    from llama import generation

    with contextlib.redirect_stdout(sys.stderr):
        return generation.Llama.build(model, **load)


def read_shape(given: Any) -> Any:
    """What an option for an answer's shape says, or the file that it names."""
    if not isinstance(given, Path):
        return given
    from llama.files.text import read_text

    return read_text(given)


def build_to_sample(model: str | None, load: dict[str, Any], sample: dict[str, Any]) -> tuple[Llama, SamplingParams]:
    """The model, and how to sample from it: with a seed that is drawn at each start, if none was given, and told."""
    from llama import checkpoint  # by way of the package, which lets no collections slow torch's import
    from llama.sampling_params import SamplingParams

    recommended = checkpoint.DEFAULT_SETTINGS if model is None else {}
    params = SamplingParams(**recommended | {"seed": secrets.randbelow(10**9)} | sample)
    llm = build(model, load)
    if model is None and llm.rank == 0:
        note(f"This is {checkpoint.DEFAULT_ABOUT}; give MODEL for a better one.")
    if "seed" not in sample and params.temperature != 0 and llm.rank == 0:
        note(f"--seed {params.seed} gives the same answers again")
    return llm, params


def remote_to_sample(url: str, api_key: str | None, sample: dict[str, Any]) -> tuple[RemoteModel, SamplingParams]:
    """The model of a server, and how to sample from it: what was not given is left to the server."""
    from llama.client import RemoteModel
    from llama.sampling_params import SamplingParams

    llm = RemoteModel(url, api_key)
    note(f"This is {llm.name} at {llm.url}.")
    return llm, SamplingParams(**sample)


def validate_remote(context: typer.Context, model: str | None) -> None:
    """Raises WrongCall for a model, or options of one, beside the address of a server."""
    given = [option.flag or option.name for option in MODEL if is_given(context, option.name)]
    if model is not None or given:
        what = "a model" if model is not None else "--" + given[0].lstrip("-").replace("_", "-")
        raise WrongCall(f"{what} is given with --url: the server has its model, so give one or the other")


def validate_replicas(replicas: int | None, ray_address: str | None, load: dict[str, Any]) -> bool:
    """Whether there are to be replicas. Raises WrongCall for what goes with none, or not with ranks."""
    if replicas is None and ray_address is not None:
        raise WrongCall(f"--ray-address is {ray_address}, but nothing is to run there: give --replicas N too")
    if replicas is not None and "RANK" in os.environ:
        raise WrongCall("--replicas begins processes of its own: run it without torchrun")
    if replicas is not None and "pipeline_parallel_size" in load:
        raise WrongCall("--pipeline-parallel-size is for ranks, and each replica is one process: leave one of them out")
    return replicas is not None


def is_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name != "DEFAULT"


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        tell(f"llama: warning: {warning}")


def path_of(model: str | None) -> Path:
    from llama import checkpoint

    return checkpoint.default_model() if model is None else checkpoint.resolve(model)


def names_a_model(argument: str) -> bool:
    """Whether a lone argument of `chat` is a checkpoint rather than a message: the rule that its help states."""
    if os.path.exists(argument):
        return True
    if re.search(r"\s", argument):
        return False
    is_path = re.match(r"(~[\w.-]*|\.{0,2})/|[A-Za-z]:\\", argument) or argument.endswith(".gguf")
    return bool(is_path or NAME.fullmatch(argument))


def main() -> None:
    """Runs the command line and exits: 0, 2 for a wrong call, 1 for whatever else a person can cause."""
    with running("llama"):
        try:
            if app(standalone_mode=False) == INTERRUPTED:
                raise KeyboardInterrupt
        except USAGE_ERROR as error:
            where = error.ctx.command_path if error.ctx else "llama"
            fail("llama", f"{error.format_message().rstrip('.')}; see '{where} --help'", 2)
        except WrongCall as error:
            fail("llama", str(error), 2)
        except typer.Abort:
            raise KeyboardInterrupt from None


if __name__ == "__main__":
    main()
